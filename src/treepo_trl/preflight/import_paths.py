"""Import paths that options give: what can be said about them before anything is imported."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec


def check_import_path(option: str, path: str, separator: str) -> None:
    """
    Raise where an option names no module that is here. The module is not run.

    Args:
        option (`str`):
            Its name in errors.
        path (`str`):
            Import path of a module, separator, and the name in it.
        separator (`str`):
            What stands between the two.

    Raises:
        ValueError: if the path is none, or its first package or file is not found.
    """
    module, _, name = path.rpartition(separator)
    if not module or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(f"`{option} {path}` is no import path. Give one such as `my_package.file{separator}name`.")
    first = module.partition(".")[0]
    beside_run = PathFinder.find_spec(first, [os.getcwd()])
    if beside_run is None and first not in sys.modules and find_spec(first) is None:
        raise ValueError(could_not_load(option, path, f"No module named {first!r}"))


def find_beside_run() -> None:
    """
    Let modules of the working directory be found, as in TRL's script.

    Not before torch and TRL are imported: a file there may have the name of a library.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def could_not_load(option: str, path: str, error: object) -> str:
    """The message about an import path that leads nowhere."""
    return (
        f"`{option} {path}` could not be loaded: {error}. Check the path, and that {os.getcwd()} or the "
        "installed packages hold it."
    )
