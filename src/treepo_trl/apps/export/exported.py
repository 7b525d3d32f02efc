"""What an export has made, and how far it is from the adapter on its base."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Difference:
    """Distances between log-probabilities of the same tokens, in nats."""

    mean: float
    largest: float
    of_adapter: float
    """Mean distance between the base with its adapter and without."""

    @property
    def is_lost_to_rounding(self) -> bool:
        """Whether the merge has moved the model by more than a quarter of what the adapter does."""
        return self.mean > 0.25 * self.of_adapter


@dataclass(frozen=True)
class Export:
    """A model that was exported."""

    folder: Path
    dtype: torch.dtype
    was_4bit: bool
    difference: Difference
