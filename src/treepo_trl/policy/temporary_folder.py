"""
Temporary folders that outlive no process for long: the next start removes what a killed one has left.

A folder is in use while its owner holds a lock on it. The kernel drops a lock with the last process that holds it,
however that ends. A process id in the name would prove less: ids are used again, and containers that share
`/dev/shm` count them each for itself. It is there for people.
"""

import os
import re
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from treepo_trl.file_lock import lock


SHARED_MEMORY = Path("/dev/shm")

_NAME = re.compile(r"treepo-trl-[a-z]+-\d+-[a-z0-9_]{8}")  # as `TemporaryFolder` makes it, with `mkdtemp`


class TemporaryFolder:
    """
    A folder that is removed with this object, at the end of the process, or by the next start on this machine.

    Args:
        kind (`str`):
            What it is for, a word for its name.
        parent (`str` or `Path`):
            Where to make it.

    Attributes:
        path (`str`):
            The folder.
    """

    def __init__(self, kind: str, parent: str | Path) -> None:
        for place in {Path(parent), SHARED_MEMORY, Path(tempfile.gettempdir())}:
            remove_leftovers(place)
        self.path, descriptor = _make_locked(f"treepo-trl-{kind}-{os.getpid()}-", parent)
        self.remove = weakref.finalize(self, _remove, self.path, descriptor)


def place_for(size: int) -> str | Path:
    """Memory that looks like a disk, if there is room in it; else the folder for temporary files."""
    # Containers often have 64 MiB of it. Twice, for what else lies there.
    if os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free > 2 * size:
        return SHARED_MEMORY
    return tempfile.gettempdir()


def shared_folder(kind: str, parent: str | None, size: int) -> TemporaryFolder:
    """
    A temporary folder that other programs read too.

    Args:
        kind (`str`):
            What it is for, a word for its name.
        parent (`str`, *optional*):
            Where to make it; made if it is missing. Default: as [`place_for`] says.
        size (`int`):
            Bytes that will lie in it.

    Raises:
        ValueError: if it cannot be made there.
    """
    try:
        if parent is not None:
            os.makedirs(parent, exist_ok=True)
        folder = TemporaryFolder(kind, place_for(size) if parent is None else parent)
        os.chmod(folder.path, 0o755)  # a server may run as another user
    except OSError as error:
        raise ValueError(
            f"No folder can be made in {parent!r} (`vllm_server_adapter_dir`): {error.strerror}. Name another one."
        ) from error
    return folder


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders in `parent` that this user has made and no living process uses."""
    with suppress(OSError):  # not there, or not to be read
        for name in os.listdir(parent):
            if _NAME.fullmatch(name):
                with suppress(OSError):  # in use, gone meanwhile, or no folder
                    _remove_unused(parent / name)


def _remove_unused(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():  # root may open everyone's
            lock(descriptor)
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _make_locked(prefix: str, parent: str | Path) -> tuple[str, int]:
    """A new folder, and the open descriptor that holds its lock."""
    while True:
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another start has found it before it was locked
            continue
        try:
            lock(descriptor)
            os.stat(path)
        except (FileNotFoundError, BlockingIOError):  # the same, a moment later
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks: nobody else can lock it, so nobody else removes it
            pass
        return path, descriptor


def _remove(path: str, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)
