"""
What settings may be: types, ranges, and what excludes each other; each conflict is refused in one place, once.

Every room may import it, so it loads the standard library alone. Files that load more are imported by their names:
`grpo`, and above `treepo_config` `arguments` and `data`, which refuse what a trainer is given.
"""

from .addresses import keep_credentials, place_and_headers, server_urls
from .exclusions import OF_TRAINING, OF_TREES, Exclusion, check_exclusions, of_this_process
from .values import Ranges, check_fields, check_int, check_ranges, check_text


__all__ = [
    "OF_TRAINING",
    "OF_TREES",
    "Exclusion",
    "Ranges",
    "check_exclusions",
    "check_fields",
    "check_int",
    "check_ranges",
    "check_text",
    "keep_credentials",
    "of_this_process",
    "place_and_headers",
    "server_urls",
]
