"""Locks that the kernel drops with the last process that holds them, however it ends. Standard library only."""


def lock(descriptor: int) -> None:
    """
    Lock an open file or folder for this process until the descriptor is closed.

    Raises:
        BlockingIOError: if it is locked already.
        OSError: where there are no locks: on Windows, and on some network file systems.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError("there are no such locks on Windows") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
