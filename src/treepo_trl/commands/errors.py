"""Errors in what a user gave, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import yaml


@contextmanager
def user_errors() -> Iterator[None]:
    """
    Turn errors in arguments, files and model names into one line and the exit status 1.

    A training or a sampling runs outside of it: an error there is no mistake of the user, and needs its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())  # YAML's and the hub's have several lines
        raise SystemExit(f"treepo-trl: error: {message}") from error
