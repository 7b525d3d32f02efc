"""Errors in what a user gave, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import yaml


_ARE_RAISED = ContextVar("errors of the user are raised as they are", default=False)


@contextmanager
def tracebacks() -> Iterator[None]:
    """Let [`user_errors`] show where in the code an error was found: `treepo-trl --debug`."""
    token = _ARE_RAISED.set(True)
    try:
        yield
    finally:
        _ARE_RAISED.reset(token)


@contextmanager
def user_errors() -> Iterator[None]:
    """
    Turn errors in arguments, files and model names into one line and the exit status 1.

    A training or a sampling runs outside of it: an error there is no mistake of the user, and needs its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, yaml.YAMLError) as error:
        if _ARE_RAISED.get():
            raise
        message = " ".join(str(error).split())  # YAML's and the hub's have several lines
        raise SystemExit(f"treepo-trl: error: {message}") from error
