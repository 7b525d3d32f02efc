"""
Dynamic sampling: prompts whose completions all have the same reward teach nothing and are replaced by fresh ones.

From [DAPO](https://huggingface.co/papers/2503.14476) (section 3.2), which the TreePO paper trains with.
[`DynamicSampling`] is what the trainer holds; the rest of the file is what it is made of, and knows no trainer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from transformers import TrainerState
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.checkpoints import saved_values
from treepo_trl.sampling import SegmentTree
from treepo_trl.settings.data import check_rows
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.trl_seams import metrics_aside
from treepo_trl.turns.conversations import Conversation
from treepo_trl.update.rewards import combine_rewards

from .prompt_selection import PassRates, Saved, SelectedPrompts
from .prompt_stream import EndlessPlaceholders, Example, Placeholders, PromptStream
from .trainer_turns import TrainerTurns
from .tree_batch import TreeBatch


logger = get_logger(__name__)

_ROUNDS_BETWEEN_WARNINGS = 10  # of one batch

Rows = list[dict[str, object]]
"""A row of the dataset for each completion."""


@dataclass(eq=False)  # each is itself alone: examples may hold tensors, whose comparison is no truth
class Candidate:
    """An example, its tree once that is sampled, and the columns that reward functions log about its completions."""

    example: Example
    tree: SegmentTree | None = None
    prompt: object = None
    """With what an environment shows."""
    conversation: Conversation | None = None
    """What the tree's turns may call."""
    extra: dict[str, list] = field(default_factory=dict)

    def give_up(self) -> None:
        """Another example takes this one's place."""
        if self.conversation is not None and self.conversation.environment is not None:
            self.conversation.environment.release()


@dataclass
class DynamicBatch:
    """
    A filled batch.

    Attributes:
        candidates (`list[Candidate]`):
            This process's prompts, each with its tree.
        rewards (`torch.Tensor` of shape `(num_prompts * num_generations, num_reward_funcs)`):
            Rewards of all processes' completions.
        num_rounds (`int`):
            How often prompts were replaced.
        num_replaced (`int`):
            Prompts of all processes that were drawn, sampled and given up.
        frac_without_signal (`float`):
            Fraction of all processes' prompts that still have no signal after the last round.
        drawn (`list[dict]`):
            Examples of all processes that were sampled, also those that were given up.
        drawn_rewards (`torch.Tensor` of shape `(len(drawn), num_generations)`):
            Weighted sums of their rewards.
    """

    candidates: list[Candidate]
    rewards: torch.Tensor
    num_rounds: int
    num_replaced: int
    frac_without_signal: float
    drawn: list[Example]
    drawn_rewards: torch.Tensor

    @property
    def trees(self) -> list[SegmentTree]:
        """Trees of this process's prompts."""
        return [candidate.tree for candidate in self.candidates if candidate.tree is not None]

    def extra_columns(self, num_generations: int) -> dict[str, list[object]]:
        """What reward functions log about this process's completions; `None` for those of prompts without a column."""
        names = {name: None for candidate in self.candidates for name in candidate.extra}
        empty: list[object] = [None] * num_generations
        return {name: [v for each in self.candidates for v in each.extra.get(name, empty)] for name in names}

    def metrics(self) -> dict[str, float]:
        """Metrics under `dynamic_sampling/`."""
        return {
            "dynamic_sampling/rounds": self.num_rounds,
            "dynamic_sampling/replaced_prompts": self.num_replaced,
            "dynamic_sampling/frac_without_signal": self.frac_without_signal,
            "dynamic_sampling/reward": self.drawn_rewards.nanmean().item(),
        }


def without_signal(
    rewards: torch.Tensor, weights: torch.Tensor, aggregation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which prompts have completions of one reward only, and every completion's reward.

    A prompt of which no completion or a single one could be scored has no signal either.

    Args:
        rewards (`torch.Tensor` of shape `(num_prompts, num_generations, num_reward_funcs)`):
            `nan` where a function does not apply.
        weights (`torch.Tensor` of shape `(num_reward_funcs,)`):
            Weight of each reward function.
        aggregation (`str`):
            `GRPOConfig.multi_objective_aggregation`.

    Returns:
        Booleans `(num_prompts,)` and weighted sums `(num_prompts, num_generations)`.
    """
    num_prompts, num_generations, num_funcs = rewards.shape
    flat = rewards.reshape(-1, num_funcs)
    combined, _ = combine_rewards(flat, weights, num_generations, aggregation, "none")
    sums, _ = combine_rewards(flat, weights, num_generations, "sum_then_normalize", "none")
    is_equal = _is_equal(combined.view(num_prompts, num_generations))
    if aggregation == "normalize_then_sum":
        # Function by function too: the normalization of equal rewards leaves rounding errors that are not equal.
        is_equal |= _is_equal(rewards.transpose(1, 2)).all(1)
    return is_equal, sums.view(num_prompts, num_generations)


def fill_batch(
    stream: PromptStream | SelectedPrompts,
    num_local: int,
    num_rounds: int,
    score: Callable[[list[Candidate], int], torch.Tensor],
    is_without_signal: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    process_index: int = 0,
    num_processes: int = 1,
) -> DynamicBatch:
    """
    Draw prompts until every one has completions of different rewards or the rounds are used up.

    A prompt without signal gives its place to the next one of the stream. After the last round those that still have
    none stay, with advantages of 0, so that the batch keeps its size.

    Args:
        stream ([`PromptStream`] or [`SelectedPrompts`]):
            Prompts; at the same position on every process.
        num_local (`int`):
            Prompts per process.
        num_rounds (`int`):
            How often to replace prompts at most.
        score (`Callable[[list[Candidate], int], torch.Tensor]`):
            Samples the trees of the candidates that have none and scores all of them, given the round. Returns the
            rewards `(num_processes, num_candidates, num_generations, num_reward_funcs)` of all processes, which call
            it with equally many candidates.
        is_without_signal (`Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]`):
            [`without_signal`] for rewards `(num_prompts, num_generations, num_reward_funcs)`.
        process_index (`int`):
            Rank of this process.
        num_processes (`int`):
            How many processes share the batch.

    Returns:
        [`DynamicBatch`].
    """
    drawn = stream.take(num_local * num_processes)
    batch = [Candidate(example) for example in drawn[process_index * num_local :][:num_local]]
    rewards = score(batch, 0)
    is_equal, sums = is_without_signal(rewards.flatten(0, 1))
    is_replaced, scored = is_equal.view(num_processes, num_local), [sums]
    num_replaced, used, num_tokens = 0, 0, _num_tokens(batch)
    while used < num_rounds and is_replaced.any():
        used += 1
        counts = is_replaced.sum(1).tolist()
        drawn += stream.take(sum(counts))
        fresh = drawn[len(drawn) - sum(counts[process_index:]) :][: counts[process_index]]
        # Rewards are gathered, and every process must bring as many. Those with less to replace fill up with prompts
        # that they keep, whose trees are there and whose rewards are not used again.
        places = is_replaced.byte().argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
        for place, example in zip(places[process_index, : len(fresh)].tolist(), fresh, strict=True):
            batch[place].give_up()
            batch[place] = Candidate(example)
        new = score([batch[place] for place in places[process_index].tolist()], used)
        for process, count in enumerate(counts):
            rewards[process, places[process, :count]] = new[process, :count]
            is_replaced[process, places[process, :count]], sums = is_without_signal(new[process, :count])
            scored.append(sums)
        num_replaced += sum(counts)
        num_tokens += _num_tokens([batch[place] for place in places[process_index, : len(fresh)].tolist()])
        if used % _ROUNDS_BETWEEN_WARNINGS == 0 and is_replaced.any():
            logger.warning(
                f"Dynamic sampling has replaced prompts {used} times for one batch, and {int(is_replaced.sum())} of "
                f"{is_replaced.numel()} have no signal yet: their completions have equal rewards. It has sampled "
                f"{is_replaced.numel() + num_replaced} prompts and, on this process, {num_tokens} tokens for it. It "
                f"stops when every prompt has a signal, or after {num_rounds} rounds (`dynamic_sampling_rounds`)."
            )
    return DynamicBatch(
        batch,
        rewards.flatten(0, 2),
        used,
        num_replaced,
        is_replaced.float().mean().item(),
        drawn,
        torch.cat(scored),
    )


def _num_tokens(candidates: list[Candidate]) -> int:
    return sum(candidate.tree.num_unique_tokens for candidate in candidates if candidate.tree is not None)


# In the state that checkpoints save:
_PROMPTS_DRAWN = "treepo_prompts_drawn"  # pass over the dataset and examples drawn
_PASS_RATES = "treepo_pass_rates"


class DynamicSampling:
    """
    Chooses the prompts of each batch of a training, with `dynamic_sampling_rounds`, `prompt_selection` or both.

    Its place in the dataset and the prompts' pass rates are part of checkpoints.

    Args:
        trainer ([`TreePOTrainer`]):
            Scores completions, and has the dataset and the state of the training.
        sample (`Callable[[TreeBatch, list[list[int]], list[Conversation], int], list[SegmentTree]]`):
            Samples the trees of this process's prompts for a batch, given what they may call and the round.
        turns ([`TrainerTurns`]):
            Tools and environments.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        sample: Callable[[TreeBatch, list[list[int]], list[Conversation], int], list[SegmentTree]],
        turns: TrainerTurns,
    ) -> None:
        self.args = cast(TreePOConfig, trainer.args)
        self._trainer, self._sample, self._turns = trainer, sample, turns
        self._num_generations = cast(int, trainer.num_generations)
        self._stream: PromptStream | SelectedPrompts | None = None
        self._state: TrainerState | None = None  # of the training that the stream belongs to

    # Choosing

    def fill(self, batch: TreeBatch, num_prompts: int) -> Rows:
        """
        Give the batch `num_prompts` prompts of this process, with their trees and rewards; see [`fill_batch`].

        Returns the rows, as the data loader would give them.
        """
        trainer = self._trainer
        stream = self._current_stream()
        trainer._pending_extra_logs.clear()  # of a batch that failed
        weights = trainer.reward_weights.to(trainer.accelerator.device)
        chosen = fill_batch(
            stream,
            num_prompts,
            self.args.dynamic_sampling_rounds,
            partial(self._score, batch),
            lambda rewards: without_signal(rewards, weights, trainer.multi_objective_aggregation),
            trainer.accelerator.process_index,
            trainer.accelerator.num_processes,
        )
        metrics = chosen.metrics() if self.args.dynamic_sampling_rounds > 0 else {}
        if isinstance(stream, SelectedPrompts):
            metrics |= stream.learn(chosen.drawn, chosen.drawn_rewards)
            saved_values(trainer.state)[_PASS_RATES] = stream.rates.saved
        saved_values(trainer.state)[_PROMPTS_DRAWN] = stream.position
        batch.give(chosen.trees, chosen.rewards)
        self._turns.show(conversations_of(chosen.candidates))
        for column, values in chosen.extra_columns(self._num_generations).items():
            trainer._pending_extra_logs[column] += values
        for name, value in metrics.items():
            trainer._metrics["train"][name].append(value)
        return self._rows(chosen.candidates)

    def _score(self, batch: TreeBatch, candidates: list[Candidate], round_number: int) -> torch.Tensor:
        """Rewards of all processes' candidates; see [`fill_batch`]. Logs nothing, as most may yet be replaced."""
        trainer = self._trainer
        missing = [candidate for candidate in candidates if candidate.tree is None]
        prompt_ids: list[list[int]] = []
        check_rows(trainer, [candidate.example for candidate in missing])
        if missing:
            opened = self._turns.open(self._rows(missing)[:: self._num_generations])
            for candidate, prompt, conversation in zip(missing, *opened, strict=True):
                candidate.prompt, candidate.conversation = prompt, conversation
            prompt_ids, _, _ = trainer._tokenize_prompts([candidate.prompt for candidate in missing])
        # Also without any: processes that share an engine sample together.
        trees = self._sample(batch, prompt_ids, conversations_of(missing), round_number)
        for candidate, tree in zip(missing, trees, strict=True):
            candidate.tree = tree
        batch.give([candidate.tree for candidate in candidates if candidate.tree is not None])
        self._turns.show(conversations_of(candidates))
        rows = self._rows(candidates)
        prompts = [copy.deepcopy(each.prompt) for each in candidates for _ in range(self._num_generations)]
        num_tokens_seen = trainer.state.num_input_tokens_seen
        with metrics_aside(trainer):
            _, completion_ids, _, completions, *_ = trainer._generate(prompts)
        rewards = trainer._calculate_rewards(rows, prompts, completions, completion_ids)
        trainer.state.num_input_tokens_seen = num_tokens_seen
        for i, candidate in enumerate(candidates):
            if candidate in missing:  # the others fill up the number of candidates; their rewards are there
                own = slice(i * self._num_generations, (i + 1) * self._num_generations)
                candidate.extra = {column: values[own] for column, values in trainer._pending_extra_logs.items()}
        trainer._pending_extra_logs.clear()
        return rewards.view(trainer.accelerator.num_processes, len(candidates), self._num_generations, -1)

    def _rows(self, candidates: list[Candidate]) -> Rows:
        """A row for each completion, of its own: reward functions may change what they are given."""
        trainer = self._trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
        examples = [candidate.example for candidate in candidates for _ in range(self._num_generations)]
        return cast(Rows, send_to_device(collate(copy.deepcopy(examples)), trainer.accelerator.device))

    # The place in the dataset

    def placeholders(self) -> torch.utils.data.Dataset:
        """What the data loader reads in place of the dataset: it only counts steps."""
        dataset = self._dataset
        return EndlessPlaceholders() if isinstance(dataset, IterableDataset) else Placeholders(len(dataset))

    @property
    def _dataset(self) -> Dataset | IterableDataset:
        return cast("Dataset | IterableDataset", self._trainer.train_dataset)

    def _current_stream(self) -> PromptStream | SelectedPrompts:
        """The stream of this training, at the position of the checkpoint that it resumes."""
        trainer, state = self._trainer, self._trainer.state
        if self._stream is None or self._state is not state:
            position = None
            if not self.args.ignore_data_skip:
                position = cast("tuple[int, int] | None", saved_values(state).get(_PROMPTS_DRAWN))
                if position is None and state.global_step > 0:
                    logger.warning(
                        "The checkpoint comes from a training without `dynamic_sampling_rounds` or "
                        "`prompt_selection`: it does not say which prompts that has drawn, so they are drawn from "
                        "the start of the dataset."
                    )
            number, row = position or (0, 0)  # JSON makes lists of tuples
            shuffle = bool(trainer.shuffle_dataset)
            self._stream = PromptStream(self._dataset, shuffle, self.args.seed, (number, row))
            saved_rates = cast("Saved | None", saved_values(state).pop(_PASS_RATES, None))
            if self.args.prompt_selection == "pass_rate":
                self._stream = SelectedPrompts(self._stream, PassRates(saved_rates), self.args.seed)
            self._state = state
        return self._stream


def conversations_of(candidates: list[Candidate]) -> list[Conversation]:
    """What the trees of candidates may call, as far as they were prepared."""
    return [candidate.conversation for candidate in candidates if candidate.conversation is not None]


def forget_stream(state: TrainerState) -> None:
    """Drop what checkpoints hold of prompts: a training that does not choose them draws them otherwise."""
    for name in (_PROMPTS_DRAWN, _PASS_RATES):
        saved_values(state).pop(name, None)


def _is_equal(rewards: torch.Tensor) -> torch.Tensor:
    """Whether all that is not `nan` in the last dimension is equal."""
    is_nan = rewards.isnan()
    return rewards.masked_fill(is_nan, -torch.inf).amax(-1) <= rewards.masked_fill(is_nan, torch.inf).amin(-1)
