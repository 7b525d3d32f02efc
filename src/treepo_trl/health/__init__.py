"""Illnesses of a training, found in what it logs: rules, a callback that applies them, and runs on a disk."""

from .callback import HealthCallback
from .examination import Examination, Finding
from .rules import RULES
from .runs import RunLogs, logs_of_run


__all__ = ["RULES", "Examination", "Finding", "HealthCallback", "RunLogs", "logs_of_run"]
