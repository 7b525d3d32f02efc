"""Threads for calls that may never return. Standard library only."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar


T = TypeVar("T")


class Workers:
    """
    A few threads that work off a queue.

    Unlike `concurrent.futures.ThreadPoolExecutor` they do not keep the process from ending: a tool that hangs would.

    Args:
        count (`int`):
            Most threads at a time. 0 does the work in the thread that submits it.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._queue: SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_open = 0  # submitted and not done
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Do some work; returns at once if there are threads."""
        future: Future[T] = Future()
        if self.count == 0:
            _do(future, work)
            return future
        with self._lock:
            self._num_open += 1
            if self._num_open > len(self._threads) and len(self._threads) < self.count:
                self._threads.append(threading.Thread(target=self._run, name="tool", daemon=True))
                self._threads[-1].start()
        self._queue.put((future, work))  # pyright: ignore[reportArgumentType] - of any result
        return future

    def end(self, seconds: float) -> bool:
        """
        Forget what is queued and end the threads; whether all have ended.

        Args:
            seconds (`float`):
                How long to wait for work that has been started. A thread that goes on longer ends after its work.
        """
        with suppress(Empty):
            while (item := self._queue.get_nowait()) is not None:
                item[0].cancel()
        with self._lock:
            threads, self._threads, self._num_open = self._threads, [], 0
        for _ in threads:
            self._queue.put(None)
        self._queue = SimpleQueue() if threads else self._queue  # threads keep theirs
        until = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in threads)

    def _run(self) -> None:
        queue = self._queue
        while (item := queue.get()) is not None:
            _do(*item)
            with self._lock:
                self._num_open -= queue is self._queue


def _do(future: "Future[T]", work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
            raise  # Ctrl-C
    else:
        future.set_result(result)


def within(seconds: float | None, work: Callable[[], T]) -> T:
    """
    The result of some work.

    Raises:
        TimeoutError: if it takes longer. Nothing can stop it: it goes on in a thread of its own.
    """
    if seconds is None:
        return work()
    future: Future[T] = Future()
    threading.Thread(target=_do, args=(future, work), name="tool", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the work's own
            raise
        raise WorkTimeoutError from None


class WorkTimeoutError(TimeoutError):
    """The time of some work is over."""
