"""The rules, applied to a training log by log. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass

from .rules import RULES, History, Rule


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
    """Reads logs, and tells each illness once."""

    def __init__(self) -> None:
        self._history = History()
        self._told: set[str] = set()

    def add(self, log: Mapping[str, object]) -> list[Finding]:
        """Read the next log. Returns what is new."""
        self._history.add(log)
        seen = [(rule, rule.check(self._history)) for rule in RULES if rule.name not in self._told]
        found = [Finding(rule, self._history.step, words) for rule, words in seen if words is not None]
        self._told |= {finding.rule.name for finding in found}
        return found

    def without_data(self) -> list[Rule]:
        """The rules none of whose metrics was logged."""
        return [rule for rule in RULES if not any(self._history.names(*name.split("*")) for name in rule.metrics)]
