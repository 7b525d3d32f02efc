"""
Dynamic sampling: prompts whose completions all have the same reward teach nothing and are replaced by fresh ones.

From [DAPO](https://huggingface.co/papers/2503.14476) (section 3.2), which the TreePO paper trains with.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from .sampling.tree import SegmentTree
from .update.rewards import combine_rewards


class PromptStream:
    """
    The dataset's examples one after another, without end: each once per pass, in `GRPOTrainer`'s order.

    Every process reads the whole stream. Unlike `GRPOTrainer`'s batches it leaves none out at the end of a pass: a
    batch goes on into the next one.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Where the examples come from.
        shuffle (`bool`):
            Whether each pass has an order of its own; over a buffer for an `IterableDataset`.
        seed (`int`):
            Seed of the orders.
        position (`tuple[int, int]`):
            Where to start: pass, and number of its examples that are already drawn.
    """

    def __init__(
        self, dataset: Dataset | IterableDataset, shuffle: bool, seed: int, position: tuple[int, int] = (0, 0)
    ) -> None:
        self.position = position
        self._dataset, self._shuffle = dataset, shuffle
        self._generator = torch.Generator().manual_seed(seed)
        if isinstance(dataset, IterableDataset):
            self._dataset = dataset.shuffle(seed=seed) if shuffle else dataset
        else:
            for _ in range(position[0]):  # the orders of all passes come from one generator, one after another
                self._next_order()
        self._rest = self._pass(*position)

    def take(self, count: int) -> list[dict[str, Any]]:
        """
        Draw the next `count` examples.

        Raises:
            ValueError: if a whole pass holds none.
        """
        examples: list[dict[str, Any]] = []
        while len(examples) < count:
            number, row = self.position
            part = list(islice(self._rest, count - len(examples)))
            examples += part
            self.position = (number, row + len(part))
            if len(examples) == count:
                break
            if self.position[1] == 0:
                raise ValueError(
                    f"Pass {number + 1} over the training dataset gave no example. Check how it is loaded "
                    "and filtered; a source that can be read only once must hold the prompts of all steps and "
                    "replacements."
                )
            self.position = (number + 1, 0)
            self._rest = self._pass(number + 1, 0)
        return examples

    def _pass(self, number: int, start: int) -> Iterator[dict[str, Any]]:
        dataset: Any = self._dataset
        if isinstance(dataset, IterableDataset):
            dataset.set_epoch(number)
            return islice(dataset, start, None)
        order = self._next_order()
        return (dataset[int(index)] for index in order[start:])

    def _next_order(self) -> torch.Tensor:
        """Order of the next pass, as TRL's `RepeatSampler` draws it."""
        size = len(self._dataset)  # pyright: ignore[reportArgumentType]
        return torch.randperm(size, generator=self._generator) if self._shuffle else torch.arange(size)


class Placeholders(torch.utils.data.Dataset):
    """
    As many empty examples as a dataset has.

    The data loader that counts a training's steps reads these, so that nothing is loaded that is not used.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}


class EndlessPlaceholders(torch.utils.data.IterableDataset):
    """[`Placeholders`] for an `IterableDataset`, whose steps are counted by `max_steps`."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return repeat({})


@dataclass(eq=False)  # each is itself alone: examples may hold tensors, whose comparison is no truth
class Candidate:
    """An example, its tree once that is sampled, and the columns that reward functions log about its completions."""

    example: dict[str, Any]
    tree: SegmentTree | None = None
    extra: dict[str, list] = field(default_factory=dict)


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
        mean_reward (`float`):
            Mean over every completion that was scored, also of the prompts that were given up.
    """

    candidates: list[Candidate]
    rewards: torch.Tensor
    num_rounds: int
    num_replaced: int
    frac_without_signal: float
    mean_reward: float


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
    stream: PromptStream,
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
        stream ([`PromptStream`]):
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
    num_replaced, used = 0, 0
    while used < num_rounds and is_replaced.any():
        used += 1
        counts = is_replaced.sum(1).tolist()
        fresh = stream.take(sum(counts))[sum(counts[:process_index]) :][: counts[process_index]]
        # Rewards are gathered, and every process must bring as many. Those with less to replace fill up with prompts
        # that they keep, whose trees are there and whose rewards are not used again.
        places = is_replaced.byte().argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
        for place, example in zip(places[process_index, : len(fresh)].tolist(), fresh, strict=True):
            batch[place] = Candidate(example)
        new = score([batch[place] for place in places[process_index].tolist()], used)
        for process, count in enumerate(counts):
            rewards[process, places[process, :count]] = new[process, :count]
            is_replaced[process, places[process, :count]], sums = is_without_signal(new[process, :count])
            scored.append(sums)
        num_replaced += sum(counts)
    return DynamicBatch(
        batch,
        rewards.flatten(0, 2),
        used,
        num_replaced,
        is_replaced.float().mean().item(),
        torch.cat([part.flatten() for part in scored]).nanmean().item(),
    )


def _is_equal(rewards: torch.Tensor) -> torch.Tensor:
    """Whether all that is not `nan` in the last dimension is equal."""
    is_nan = rewards.isnan()
    return rewards.masked_fill(is_nan, -torch.inf).amax(-1) <= rewards.masked_fill(is_nan, torch.inf).amin(-1)
