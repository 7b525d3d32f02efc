"""
Filling a batch: prompts whose completions all have the same reward teach nothing and are replaced by fresh ones.

From [DAPO](https://huggingface.co/papers/2503.14476) (section 3.2), which the TreePO paper trains with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.logging import get_logger

from treepo_trl.sampling import SegmentTree
from treepo_trl.turns.conversations import Conversation
from treepo_trl.update.rewards import combine_rewards

from .prompt_selection import SelectedPrompts
from .prompt_stream import Example, PromptStream


logger = get_logger(__name__)

_ROUNDS_BETWEEN_WARNINGS = 10  # of one batch


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


def _is_equal(rewards: torch.Tensor) -> torch.Tensor:
    """Whether all that is not `nan` in the last dimension is equal."""
    is_nan = rewards.isnan()
    return rewards.masked_fill(is_nan, -torch.inf).amax(-1) <= rewards.masked_fill(is_nan, torch.inf).amin(-1)
