"""One training per folder: a second one that writes to it would write over the first one's checkpoints."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from treepo_trl.file_lock import lock


_locked: set[int] = set()  # descriptors of folders


def _close_in_child() -> None:
    """A process that a reward function forks may outlive the training, and is none."""
    while _locked:
        os.close(_locked.pop())


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def only_training_in(output_dir: str, is_writer: bool) -> Iterator[None]:
    """
    Context of a training: no other one writes its checkpoints or trees to the same folder meanwhile.

    Args:
        output_dir (`str`):
            Made if it is not there.
        is_writer (`bool`):
            Whether this process is the one that writes.

    Raises:
        ValueError: if another one does.
    """
    descriptor = _locked_folder(output_dir) if is_writer else None
    try:
        yield
    finally:
        if descriptor in _locked:  # it is not in a process that was forked meanwhile
            _locked.remove(descriptor)
            os.close(descriptor)


def _locked_folder(output_dir: str) -> int | None:
    """Descriptor that holds the lock of a folder; `None` where there are no locks."""
    os.makedirs(output_dir, exist_ok=True)
    try:
        descriptor = os.open(output_dir, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        return None
    try:
        lock(descriptor)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):  # no locks there
            return None
        raise ValueError(
            f"Another training writes to `output_dir` ({output_dir}): each would write over the other's "
            "checkpoints. Name another folder, or wait for its end."
        ) from None
    _locked.add(descriptor)
    return descriptor
