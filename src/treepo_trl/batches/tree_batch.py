"""
The trees of one generation batch: from segments to rows, from rewards to advantages per token, and to log records.

`GRPOTrainer` takes rows and knows no trees. A [`TreeBatch`] is made for each of its batches and holds what its methods
have no argument for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.metrics import add_totals, tree_totals
from treepo_trl.sampling import SamplingStats, SegmentTree
from treepo_trl.tree_log import TreeLogLine
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.turns.conversations import first_turn
from treepo_trl.update.advantages import EXACT_ESTIMATORS, expand_to_tokens, leaf_paths, leaf_scores, tree_advantages
from treepo_trl.update.rewards import combine_rewards
from treepo_trl.update.weighted_advantages import weighted_advantages


@dataclass
class TreeBatch:
    """
    Trees of one process and rewards of all processes.

    Rows are the leaves of the trees, depth-first, tree after tree: B of them on this process.
    """

    step: int
    """Global step before which the batch was sampled."""
    number: int = 0
    """How many samplings came before it at the same step."""
    trees: list[SegmentTree] = field(default_factory=list)
    """A tree for each prompt of this process."""
    rewards_per_func: torch.Tensor | None = None
    """`(rows of all processes, num_reward_funcs)`: rewards of the reward functions; `nan` where one does not apply."""
    totals: list[dict[str, float]] = field(default_factory=list)
    """What each sampling for this batch has cost, from `metrics.tree_totals`."""
    is_open: bool = False
    """Whether `GRPOTrainer` is at work on the batch."""
    num_sampled: int = 0
    """How often trees were sampled for rows: once, or more often if a subclass asks again."""
    _given: list[SegmentTree] | None = None
    _given_rewards: torch.Tensor | None = None

    def next(self, step: int) -> "TreeBatch":
        """The empty batch that comes after this one, sampled at a global step."""
        return TreeBatch(step, self.number + max(self.num_sampled, 1) if step == self.step else 0)

    @property
    def name(self) -> str:
        """What tells the next sampling for rows from all others of the training: seeds are made of it."""
        return f"{self.step}/{self.number + self.num_sampled}"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Context in which `GRPOTrainer` works on the batch; what it was given is good inside of it alone."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False
            self._given = self._given_rewards = None

    # What dynamic sampling has already

    def give(self, trees: list[SegmentTree], rewards_per_func: torch.Tensor | None = None) -> None:
        """Let sampling take these trees, and scoring these rewards if there are any, until the batch is closed."""
        self._given, self._given_rewards = trees, rewards_per_func

    def take(self, sample: Callable[[], list[SegmentTree]]) -> list[SegmentTree]:
        """The trees that were given, else those of `sample`; they are the batch's from now on."""
        if self._given is not None:
            self.trees = self._given
            return self.trees
        try:
            self.trees = sample()
        finally:
            self.num_sampled += 1
        return self.trees

    def adopt(self, trees: list[SegmentTree]) -> None:
        """Take trees that something else has sampled."""
        self.take(lambda: trees)
        self.totals.append(tree_totals(trees, SamplingStats(sum(tree.num_unique_tokens for tree in trees))))

    def keeping_rewards(self, calculate_rewards: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`calculate_rewards` that keeps its result, and returns the rewards that were given if there are any."""

        def keep(*args: object, **kwargs: object) -> torch.Tensor:
            given = self._given_rewards
            self.rewards_per_func = calculate_rewards(*args, **kwargs) if given is None else given
            return self.rewards_per_func

        return keep

    # Rows

    def leaves(self) -> Iterator[tuple[SegmentTree, int]]:
        """Tree and node id of each row."""
        return ((tree, leaf) for tree in self.trees for leaf in tree.leaves)

    def first_turns(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities of the first turn of each row, which TRL reads as one message."""
        turns = [first_turn(tree, leaf) for tree, leaf in self.leaves()]
        return [token_ids for token_ids, _ in turns], [logprobs for _, logprobs in turns]

    def completion_ids(self) -> list[list[int]]:
        """Completion tokens of each row."""
        return [tree.completion_ids(leaf) for tree, leaf in self.leaves()]

    def lengths(self) -> list[int]:
        """Completion tokens of each row, counted."""
        return [tree.nodes[leaf].end for tree, leaf in self.leaves()]

    def logprobs(self) -> list[list[float]]:
        """The engine's log-probability of each completion token of each row."""
        return [tree.logprobs(leaf) for tree, leaf in self.leaves()]

    # Rewards and advantages

    def combined_rewards(self, trainer: GRPOTrainer) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward of each row, and what its advantage is divided by: `(B,)` each, in the way that a trainer has set."""
        assert self.rewards_per_func is not None, "GRPOTrainer scores every completion"
        rewards, divisors = combine_rewards(
            self.rewards_per_func,
            trainer.reward_weights.to(trainer.accelerator.device),
            cast(int, trainer.num_generations),
            trainer.multi_objective_aggregation,
            trainer.scale_rewards,
        )
        num_rows = len(rewards) // trainer.accelerator.num_processes
        own = slice(trainer.accelerator.process_index * num_rows, (trainer.accelerator.process_index + 1) * num_rows)
        return rewards[own], divisors[own]

    def advantages(
        self, rewards: torch.Tensor, divisors: torch.Tensor, args: TreePOConfig, num_tokens: int
    ) -> torch.Tensor:
        """
        Tree advantages of each row's tokens.

        Args:
            rewards (`torch.Tensor` of shape `(B,)`), divisors (`torch.Tensor` of shape `(B,)`):
                Reward of each row, and what its advantage is divided by.
            args ([`TreePOConfig`]):
                Names the estimator and how leaves are weighted.
            num_tokens (`int`):
                T: tokens of the longest row.

        Returns:
            `torch.Tensor` of shape `(B, T)` on the device of the rewards; 0 past a row's end.
        """
        # Small tensors and a few dozen operations: not on the device.
        ids, lengths = leaf_paths(self.trees)
        shape = ids.shape[:2]
        of_leaves, estimator = rewards.cpu().view(shape), args.advantage_estimator
        if args.weights_leaves or estimator in EXACT_ESTIMATORS:
            # Their baselines are differences of sums, of which one unsure completion may have nearly all. The others
            # round as GRPOTrainer does, whose clip ratios count the sign of what is left of equal rewards.
            of_leaves = of_leaves.double()
        if args.weights_leaves:
            advantages = weighted_advantages(self.trees, ids, of_leaves, estimator, args.subgroup_rejection)
            advantages = advantages * shape[1]  # the loss averages over leaves, so a weight of 1/W is neutral
        else:
            scores = leaf_scores(self.trees) if estimator == "optimal_baseline" else None
            advantages = tree_advantages(
                of_leaves, ids, estimator, subgroup_rejection=args.subgroup_rejection, leaf_scores=scores
            )
        advantages = advantages / torch.nan_to_num(divisors.cpu().view(*shape, 1), nan=1.0)
        return expand_to_tokens(advantages, lengths, num_tokens).to(rewards)

    def mean_advantages(self, advantages: torch.Tensor) -> torch.Tensor:
        """Mean `(B,)` of advantages `(B, T)` over the sampled tokens of each row."""
        # TRL clears the completion mask of truncated completions, whose advantages are logged all the same.
        masks = [torch.tensor(tree.sampled_mask(leaf)) for tree, leaf in self.leaves()]
        mask = torch.nn.functional.pad(pad_sequence(masks, batch_first=True), (0, advantages.size(1)))
        is_sampled = mask[:, : advantages.size(1)].to(advantages.device)
        return (advantages * is_sampled).sum(1) / is_sampled.sum(1).clamp(min=1)

    # Logs

    def summed_totals(self) -> dict[str, float]:
        """What all samplings have cost, and the unique tokens of the trees that the batch has kept."""
        return add_totals(self.totals) | {"kept_tokens": sum(tree.num_unique_tokens for tree in self.trees)}

    def records(
        self, rewards: torch.Tensor, advantages: torch.Tensor, decode: Callable[[list[int]], str]
    ) -> list[TreeLogLine]:
        """
        A record per tree for the tree log.

        Args:
            rewards (`torch.Tensor` of shape `(B,)`):
                Reward of each row, `nan` if it could not be scored.
            advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`):
                Of each row, or of each of its tokens: the record has that of the last one.
            decode (`Callable[[list[int]], str]`):
                Text of a list of tokens.
        """
        last = advantages
        if advantages.dim() == 2:
            last = advantages[range(len(advantages)), [length - 1 for length in self.lengths()]]
        values = iter(zip(rewards.tolist(), last.tolist(), strict=True))
        records: list[TreeLogLine] = []
        for tree in self.trees:
            rows = [next(values) for _ in tree.leaves]
            records.append(
                {
                    "step": self.step,
                    "prompt": decode(tree.prompt_ids),
                    "rows": tree.leaves,
                    "rewards": [None if reward != reward else reward for reward, _ in rows],
                    "advantages": [advantage for _, advantage in rows],
                    "tree": tree.to_dict(),
                }
            )
        return records


def prompts_of_trees(prompt_ids: list[list[int]], num_generations: int) -> list[list[int]]:
    """
    The prompt of each tree, from those of its rows.

    Raises:
        RuntimeError: if the rows of a tree have different prompts.
    """
    prompts = prompt_ids[::num_generations]
    if any(ids != prompts[i // num_generations] for i, ids in enumerate(prompt_ids)):
        raise RuntimeError("A group of `num_generations` rows holds different prompts: a tree has only one.")
    return prompts


def shuffle_trees(batch: dict[str, object], num_generations: int) -> dict[str, object]:
    """
    The rows of a generation batch with its trees in random order.

    Stands in for TRL's `shuffle_sequence_dict`, which shuffles rows. Those of a tree stay together, depth-first.

    Args:
        batch (`dict[str, object]`):
            Tensors and lists with a value per row in their first dimension, numbers, and `None`.
        num_generations (`int`):
            Rows per tree.
    """
    num_trees = len(cast(torch.Tensor, batch["completion_ids"])) // num_generations
    order = torch.randperm(num_trees)[:, None] * num_generations + torch.arange(num_generations)
    rows = order.flatten()

    def permute(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value if value.ndim == 0 else value[rows.to(value.device)]
        return value if value is None else [cast("list[object]", value)[i] for i in rows]

    return {key: permute(value) for key, value in batch.items()}
