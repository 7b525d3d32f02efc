"""
What a command answers before it loads torch and TRL: its help, a mistyped option, a file that is not there.

Standard library, YAML, and the hub's client where a name is one of the hub.
"""

from .answers import answer
from .config_file import check_config, check_options
from .data_files import BUILDERS, check_data_file, require_run
from .import_paths import check_import_path
from .models import require_model
from .quiet import quiet_terminal


__all__ = [
    "BUILDERS",
    "answer",
    "check_config",
    "check_data_file",
    "check_import_path",
    "check_options",
    "quiet_terminal",
    "require_model",
    "require_run",
]
