"""What a stage of the GPU report is made of. Nothing here loads a model library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from treepo_trl.apps.doctor.findings import CannotRunError


Record = Callable[[str, float | str], None]
"""Keeps a value of a row. The name of a row ends with the unit: `spread, 8 prompts: trajectories/s`."""

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """
    A part of a stage that has a process of its own.

    Attributes:
        name (`str`):
            Names the case in the stage's file.
        run (`Callable`):
            Measures. Takes `record` and the arguments, and the checkpoint's folder as `model` if there is an
            architecture. Raises [`CannotRunError`] for what this machine cannot show.
        arguments (`dict`, *optional*):
            Keyword arguments of `run`.
        architecture (`str`, *optional*):
            Name in `benchmarks.random_models.MODELS` of the checkpoint with random weights that it needs.
    """

    name: str
    run: Callable[..., None]
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    architecture: str | None = None


@dataclass(frozen=True)
class Stage:
    """
    Attributes:
        name (`str`):
            Name of its file and on the command line.
        title (`str`):
            Heading on the page.
        about (`str`):
            What is measured, for the page.
        cases (`Callable`):
            Its cases, for a card (`False`) or at toy size for a processor (`True`).
        ratios (`tuple`):
            Rows that follow from medians of others: name, numerator, denominator.
    """

    name: str
    title: str
    about: str
    cases: Callable[[bool], list[Case]]
    ratios: tuple[tuple[str, str, str], ...] = ()


def alternating(ways: Sequence[T], seeds: int) -> list[tuple[T, int]]:
    """Every way with every seed; the order of the ways turns from seed to seed, so that no way always comes first."""
    return [(way, seed) for seed in range(seeds) for way in (ways if seed % 2 == 0 else list(ways)[::-1])]


def require_card(what: str) -> None:
    """Raise [`CannotRunError`] where there is no CUDA card."""
    import torch

    if not torch.cuda.is_available():
        raise CannotRunError(f"{what} needs a CUDA card")


def as_cell(line: str) -> str:
    """A line as a cell of a table."""
    return " ".join(line.split()).replace("|", "/")[:160]
