"""
What is refused before a run because it would fail late or not at all: arguments, data, tokenizers, tools.

Needs the settings, and of a trainer only what TRL gives it; what a field may hold by itself is in `fields`.
"""

from .arguments import check_arguments, check_number_type
from .data import NoStepIsAnError, check_datasets, check_rows, check_tokenizer
from .turns import check_tools


__all__ = [
    "NoStepIsAnError",
    "check_arguments",
    "check_datasets",
    "check_number_type",
    "check_rows",
    "check_tokenizer",
    "check_tools",
]
