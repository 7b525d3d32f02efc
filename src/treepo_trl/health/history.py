"""What a training has logged, metric by metric. Standard library only."""

import math
from collections.abc import Mapping


_LARGEST = 1e100
"""Values beyond are no measurements, and their sums would overflow."""


class History:
    """
    Values of each metric in the order in which they were logged.

    Attributes:
        step (`int`):
            Global step of the last log.
    """

    def __init__(self) -> None:
        self.step = 0
        self._logged: dict[str, list[float | None]] = {}
        self._known: dict[str, list[float]] = {}
        self._steps: dict[str, list[int]] = {}

    def add(self, log: Mapping[str, object]) -> None:
        """Add a log as `Trainer.log` keeps it: metrics and the global step. What is no number is left out."""
        step = _number(log.get("step"))
        if step is not None and math.isfinite(step):
            self.step = int(step)
        for name, value in log.items():
            number = _number(value)
            if number is None and value is not None:
                continue
            self._logged.setdefault(name, []).append(number)
            if number is not None and abs(number) <= _LARGEST:
                self._known.setdefault(name, []).append(number)
                self._steps.setdefault(name, []).append(self.step)

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Metrics that were logged, in the order of their first log."""
        return [name for name in self._logged if name.startswith(prefix) and name.endswith(suffix)]

    def logged(self, name: str) -> list[float | None]:
        """All values of a metric. TRL logs `None` where a batch had no value."""
        return self._logged.get(name, [])

    def known(self, *names: str) -> list[float]:
        """Values of the first of these metrics that has any, without missing, infinite and absurd ones."""
        return next((self._known[name] for name in names if name in self._known), [])

    def steps(self, name: str) -> list[int]:
        """The global step of each value in `known(name)`."""
        return self._steps.get(name, [])


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None
