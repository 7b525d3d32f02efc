"""Environments: a counter, with and without hooks."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.tools import ScriptedAgent, call, tool_config, tool_trainer


GAME = [*(f"First. {call('step', n=n)}" for n in (1, 2, 3)), f"Two. {call('step', n=1)}\n{call('step', n=2)}", "No."]
GOES_ON = [*(f"Then. {call('step', n=n)}" for n in (1, 2, 3)), "Done.", "That is it."]


class Counter:
    """A number that starts where the example says, and should reach 10."""

    made: list["Counter"]  # of each subclass
    resets: list[dict[str, Any]]

    def __init__(self) -> None:
        type(self).made.append(self)
        self.log: list[int] = []
        self.is_closed = False

    def reset(self, start: int, **kwargs: Any) -> str:
        type(self).resets.append({"start": start, **kwargs})
        self.value, self.log = start, []
        return f" The counter shows {start}."

    def step(self, n: int) -> str:
        """
        Adds to the counter.

        Args:
            n: How much.
        """
        self.value += n
        self.log.append(n)
        return f"It shows {self.value}."

    def get_reward(self) -> float:
        return -abs(10 - self.value) / 10

    def _close(self) -> None:
        self.is_closed = True


class Forking(Counter):
    def _fork(self) -> "Forking":
        other = type(self)()
        other.value, other.log = self.value, list(self.log)
        return other


class RandomStep(Counter):
    """Adds something else each time."""

    draws = itertools.count()

    def step(self, n: int) -> str:
        """
        Adds to the counter.

        Args:
            n: How much.
        """
        return super().step(n + next(self.draws) % 7)


class RandomReset(Counter):
    draws = itertools.count()

    def reset(self, start: int, **kwargs: Any) -> str:
        return super().reset(start) + f" It is day {next(self.draws)}."


class RandomForking(RandomReset, Forking):
    """Its reset is random, and paths fork."""


def fresh(environment: type) -> Any:
    """A subclass that counts for itself, of the same name."""
    return type(environment.__name__, (environment,), {"made": [], "resets": []})


def calls_of(completion: Sequence[dict[str, Any]]) -> list[int]:
    """What the conversation has asked to add, as far as it was answered or could be."""
    asked = [each for message in completion for each in message.get("tool_calls") or []]
    return [each["function"]["arguments"]["n"] for each in asked]


def game_trainer(cls: type, folder: Path, environment: Any, seed: int = 3, **changes: Any) -> Any:
    arguments = {name: changes.pop(name) for name in list(changes) if name in ("train_dataset", "tools")}
    settings = {"max_completion_length": 500, **changes}
    return tool_trainer(
        cls,
        tool_config(folder, **settings),
        ScriptedAgent(seed, GAME, GOES_ON),
        **{"tools": None, "environment_factory": environment, "reward_funcs": [], **arguments},
    )
