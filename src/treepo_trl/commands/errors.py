"""Errors that a user of the command line can set right, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import yaml


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors in arguments, files and model names into one line, not a traceback. Not for the long job itself."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"treepo-trl: error: {error}") from error
