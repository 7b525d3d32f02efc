"""
Prompt selection: prompts whose completions were nearly all right or nearly all wrong are passed over, mostly.

Nothing is decoded for a prompt that is passed over, where dynamic sampling finds out by sampling it.
"""

import random
from typing import TypedDict

import torch
from datasets.fingerprint import Hasher

from .prompt_stream import Example, PromptStream


LEAST_CHANCE = 0.2
"""Of any prompt of the stream to be taken: policies change, and no prompt is left out for ever."""
_KEPT = 0.5  # of what earlier visits have shown, at each new one
_MOST_PROMPTS = 100_000  # that are remembered: 5 MB of a checkpoint


class Saved(TypedDict):
    """What checkpoints hold, as JSON has it."""

    range: list[float]
    """Lowest and highest reward; empty before the first."""
    prompts: dict[str, list[float]]
    """By the hash of a row: sum and number of rewards, with the weights of their visits."""


class PassRates:
    """
    What the completions of each prompt have shown, the later visits more.

    A pass rate `p` is the mean reward on a scale from the lowest to the highest reward of the training so far. On that
    scale `p (1 - p)` is the largest variance that rewards with this mean can have (Bhatia and Davis, 2000), and for
    rewards of 0 and 1 it is the variance. A prompt is taken with the chance `4 p (1 - p)`, `LEAST_CHANCE` at least.

    Rows of a dataset that are equal are one prompt. The 100,000 that were visited last are remembered.

    Args:
        saved (`dict`, *optional*):
            What `saved` gave.
    """

    def __init__(self, saved: Saved | None = None) -> None:
        self._saved: Saved = saved or {"range": [], "prompts": {}}

    @property
    def saved(self) -> Saved:
        """Everything, for a checkpoint. It does not change: later rewards make another one."""
        return self._saved

    def learn(self, examples: list[Example], rewards: torch.Tensor) -> None:
        """
        Take in the rewards of examples.

        Args:
            examples (`list[dict]`):
                Rows of the dataset.
            rewards (`torch.Tensor` of shape `(len(examples), num_generations)`):
                Those that are not finite do not count.
        """
        extremes, prompts = self._saved["range"], dict(self._saved["prompts"])
        for example, row in zip(examples, rewards, strict=True):
            finite = row[row.isfinite()].tolist()
            if not finite:
                continue
            key = Hasher.hash(example)
            total, count = prompts.pop(key, [0.0, 0.0])  # its place is at the end now
            prompts[key] = [_KEPT * total + sum(finite), _KEPT * count + len(finite)]
            extremes = [min(extremes + finite), max(extremes + finite)]
        for key in list(prompts)[: max(len(prompts) - _MOST_PROMPTS, 0)]:
            del prompts[key]
        self._saved = {"range": extremes, "prompts": prompts}

    def chance(self, example: Example) -> float:
        """Of an example to be taken; 1 before its first visit."""
        seen = self._saved["prompts"].get(Hasher.hash(example))
        lowest, highest = self._saved["range"] or (0.0, 0.0)
        if seen is None or highest <= lowest:
            return 1.0
        total, count = seen
        rate = ((total - count * lowest) / (highest - lowest) + 0.5) / (count + 1)
        return max(4 * rate * (1 - rate), LEAST_CHANCE)


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

    Attributes:
        num_passed_over (`int`):
            Examples that were not taken so far.
    """

    def __init__(self, stream: PromptStream, rates: PassRates, seed: int) -> None:
        self.num_passed_over = 0
        self._stream, self._rates, self._seed = stream, rates, seed

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
            if random.Random(f"{self._seed}/{number}/{row}").random() < self._rates.chance(example):
                taken.append(example)
            else:
                self.num_passed_over += 1
        return taken
