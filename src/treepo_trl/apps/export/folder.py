"""A folder that appears under its name when all of it is on the disk, and not before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treepo_trl.policy.temporary_folder import TemporaryFolder


def check_is_new(path: Path) -> None:
    """Raise a `ValueError` if something has this name already."""
    if os.path.lexists(path):
        raise ValueError(f"`--out {path}` exists already, and is not written over. Remove it, or name another folder.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """
    Context that fills a folder beside `path`, which gets its name at the end.

    A process that is killed leaves it under a name of its own, and the next export there removes it. After an error
    there is nothing.

    Raises:
        ValueError: if something has this name already.
        OSError: if it cannot be written.
    """
    check_is_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    owned = TemporaryFolder("export", path.parent)
    try:
        yield Path(owned.path)
        for file in Path(owned.path).rglob("*"):
            _flush(file)
        _flush(Path(owned.path))
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(owned.path, 0o777 & ~mask)  # temporary folders are for their owner alone
        check_is_new(path)
        os.rename(owned.path, path)
        _flush(path.parent)
    finally:
        owned.remove()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
