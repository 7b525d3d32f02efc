"""The rules, applied to a training log by log. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass

from .history import History
from .rules import RULES, Rule


_MUCH_WORSE = 2.0
"""How many times as large the severity must be before an illness is told of again."""


@dataclass(frozen=True)
class Finding:
    """An illness at a step."""

    rule: Rule
    step: int
    """Global step of the log that showed it."""
    seen: str
    """In words, with numbers."""

    def __str__(self) -> str:
        rule = self.rule
        return f"step {self.step}: {rule.illness}: {self.seen}. Usual: {rule.usual}. Look at {rule.look_at}."


class Examination:
    """
    Reads logs, and tells each illness once; again only when it has become twice as bad.

    Attributes:
        history ([`History`]):
            What was read.
    """

    def __init__(self) -> None:
        self.history = History()
        self._told: dict[str, float] = {}

    def add(self, log: Mapping[str, object]) -> list[Finding]:
        """Read the next log. Returns what is new."""
        self.history.add(log)
        found: list[Finding] = []
        for rule in RULES:
            sighting = rule.check(self.history)
            if sighting is not None and sighting.severity > _MUCH_WORSE * self._told.get(rule.name, 0.0):
                self._told[rule.name] = sighting.severity
                found.append(Finding(rule, self.history.step, sighting.seen))
        return found

    def without_data(self) -> list[Rule]:
        """The rules none of whose metrics was logged."""
        return [rule for rule in RULES if not any(self.history.names(*name.split("*")) for name in rule.metrics)]
