"""
Illnesses of a training, found in what it logs: rules, a callback that applies them, and runs on a disk.

Names are loaded on first use: the rules need the standard library alone, the callback needs transformers.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callback import HealthCallback
    from .examination import Examination, Finding
    from .rules import RULES
    from .runs import RunLogs, logs_of_run


__all__ = ["RULES", "Examination", "Finding", "HealthCallback", "RunLogs", "logs_of_run"]

_MODULES = {
    "Examination": "examination",
    "Finding": "examination",
    "HealthCallback": "callback",
    "RULES": "rules",
    "RunLogs": "runs",
    "logs_of_run": "runs",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
