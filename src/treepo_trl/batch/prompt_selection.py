"""
Prompt selection: prompts whose completions nearly always had the same reward are passed over, mostly.

Nothing is decoded for a prompt that is passed over, where dynamic sampling finds out by sampling it.
"""

import pickle
import random
from collections import defaultdict
from contextlib import suppress

import torch
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher

from .prompt_stream import Example, PromptStream


LEAST_CHANCE = 0.2
"""Of any prompt of the stream to be taken: policies change, and no prompt is left out for ever."""
_KEPT = 0.5  # of what earlier visits have shown, at each new one
_PRIOR = 2.0  # completions of which half of the pairs differ: a group of two says little
_MOST_PROMPTS = 100_000  # that are remembered: 7 MB of a checkpoint


_NO_HASH = (TypeError, pickle.PicklingError, AttributeError)
"""What a value that cannot be pickled raises."""

Saved = dict[str, list[float]]
"""By the hash of a row: its completions times the share of their pairs that differ, and its completions; JSON."""


class PassRates:
    """
    How often the rewards of each prompt's completions have differed, the later visits counting more.

    For rewards of 0 and 1 with the pass rate `p`, two completions differ with the probability `2 p (1 - p)`. A prompt
    is taken with the chance of twice that share of pairs, so `4 p (1 - p)`, `LEAST_CHANCE` at least. How far rewards
    differ does not count: neither their scale nor an outlier decides about other prompts.

    Rows of a dataset that are equal are one prompt. Of more than 100,000 those with the smallest hashes are
    remembered, whatever the order of visits.

    Args:
        saved (`dict`, *optional*):
            What `saved` gave.
    """

    def __init__(self, saved: Saved | None = None) -> None:
        self._prompts = saved or {}

    @property
    def saved(self) -> Saved:
        """Everything, for a checkpoint. It does not change: later rewards make another one."""
        return self._prompts

    def learn(self, examples: list[Example], rewards: torch.Tensor) -> None:
        """
        Take in the rewards of a batch.

        Args:
            examples (`list[dict]`):
                Rows of the dataset. One may occur several times, with a group of completions each.
            rewards (`torch.Tensor` of shape `(len(examples), num_generations)`):
                Those that are not finite do not count, but where none is: that counts as rewards that do not differ.
        """
        visits: dict[str, list[torch.Tensor]] = defaultdict(list)
        for example, row in zip(examples, rewards, strict=True):
            visits[key_of(example)].append(row)
        prompts = dict(self._prompts)
        for key, rows in visits.items():
            differing, count = (_KEPT * each for each in prompts.get(key, (0.0, 0.0)))
            # A row without any reward says that the prompt cannot be scored; rows that a tree lacks say nothing.
            sizes = [int(row.isfinite().sum()) or len(row) for row in rows]
            differing += sum(size * differing_pairs(row) for size, row in zip(sizes, rows, strict=True))
            prompts[key] = [differing, count + sum(sizes)]
        for key in sorted(prompts)[_MOST_PROMPTS:]:
            del prompts[key]
        self._prompts = prompts

    def knows(self, example: Example) -> bool:
        """Whether anything is remembered of an example."""
        return key_of(example) in self._prompts

    def chance(self, example: Example) -> float:
        """Of an example to be taken; 1 before its first visit."""
        seen = self._prompts.get(key_of(example))
        if seen is None:
            return 1.0
        differing, count = seen
        share = (differing + _PRIOR / 2) / (count + _PRIOR)
        return min(max(2 * share, LEAST_CHANCE), 1.0)


def key_of(example: Example) -> str:
    """
    The hash of a row's content.

    Raises:
        ValueError: naming the column that has none.
    """
    try:
        return Hasher.hash(example)
    except _NO_HASH as error:
        column = next((name for name, value in example.items() if not _has_hash(value)), None)
        raise ValueError(
            f"`prompt_selection` knows a row by its content, but the column {column!r} cannot be hashed ({error}). "
            "Take it out of the rows, or leave `prompt_selection` out."
        ) from error


def _has_hash(value: object) -> bool:
    with suppress(*_NO_HASH):
        return bool(Hasher.hash(value))
    return False


def differing_pairs(rewards: torch.Tensor) -> float:
    """Share of the pairs of completions whose rewards differ; 0 with fewer than two finite rewards."""
    finite = rewards[rewards.isfinite()]
    n = len(finite)
    if n < 2:
        return 0.0
    _, counts = finite.unique(return_counts=True)
    return 1 - float((counts * (counts - 1)).sum()) / (n * (n - 1))


class SelectedPrompts:
    """
    A [`PromptStream`] that passes over examples by their pass rates.

    Which ones depends on the pass rates, the seed and the place in the stream alone: every process takes the same,
    and a training that is resumed goes on with those that it would have taken.

    Args:
        stream ([`PromptStream`]):
            All examples.
        rates ([`PassRates`]):
            What was seen of them.
        seed (`int`):
            Seed of the choices.
    """

    def __init__(self, stream: PromptStream, rates: PassRates, seed: int) -> None:
        self.rates = rates
        self._stream, self._seed = stream, seed
        self._num_seen, self._num_known, self._num_taken = 0, 0, 0  # since the last batch was learned

    @property
    def position(self) -> tuple[int, int]:
        """That of the stream."""
        return self._stream.position

    def take(self, count: int) -> list[Example]:
        """The next `count` examples that are not passed over; raises as [`PromptStream.take`] does."""
        taken: list[Example] = []
        while len(taken) < count:
            (example,) = self._stream.take(1)
            number, row = self.position
            if random.Random(f"{self._seed}/{number}/{row}").random() < self.rates.chance(example):
                taken.append(example)
            self._num_seen += 1
            self._num_known += self.rates.knows(example)
        self._num_taken += count
        return taken

    def learn(self, examples: list[Example], rewards: torch.Tensor) -> dict[str, float]:
        """
        Take in a batch, as [`PassRates.learn`] does. All processes call it together.

        Returns:
            `dict[str, float]`: metrics of the batch, under `prompt_selection/`.

        Raises:
            RuntimeError: if the processes have drawn different rows.
        """
        drawn = gather_object([[key_of(example) for example in examples]])
        if any(keys != drawn[0] for keys in drawn):
            raise RuntimeError(
                "`prompt_selection` needs the same rows on every process, and they have drawn different ones. A "
                "transform with random numbers, a path of the process, or `split_dataset_by_node` makes them differ. "
                "Give all processes the same dataset, or leave the setting out."
            )
        self.rates.learn(examples, rewards)
        seen, known, taken = self._num_seen, self._num_known, self._num_taken
        self._num_seen, self._num_known, self._num_taken = 0, 0, 0
        return {
            "prompt_selection/frac_passed_over": 1 - taken / max(seen, 1),
            "prompt_selection/frac_known": known / max(seen, 1),
        }
