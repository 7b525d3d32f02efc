"""
A first training without a hub: a small model, tasks with answers, their accuracy and a line per step.

Names are loaded on first use: the tasks need `datasets`, their accuracy `evaluate` and an engine.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .accuracy import AnswerAccuracy, greedy_completions
    from .model import small_model
    from .progress import TreeProgressCallback, lines_above_the_bar
    from .tasks import NUM_HELD_OUT, addition_tasks, answer_reward, last_number


__all__ = [
    "NUM_HELD_OUT",
    "AnswerAccuracy",
    "TreeProgressCallback",
    "addition_tasks",
    "answer_reward",
    "greedy_completions",
    "last_number",
    "lines_above_the_bar",
    "small_model",
]

_MODULES = {
    "NUM_HELD_OUT": "tasks",
    "AnswerAccuracy": "accuracy",
    "TreeProgressCallback": "progress",
    "addition_tasks": "tasks",
    "answer_reward": "tasks",
    "greedy_completions": "accuracy",
    "last_number": "tasks",
    "lines_above_the_bar": "progress",
    "small_model": "model",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
