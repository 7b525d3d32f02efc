"""Trees of a batch that a thread samples while the trainer does something else."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from treepo_trl.sampling import SegmentTree


Done = TypeVar("Done")
Sampled = tuple[list[SegmentTree], dict[str, float]]
"""Trees of this process, and what they have cost."""


def in_thread(work: Callable[[], Done]) -> "Future[Done]":
    """The result of a function that runs in a thread, which does not keep the process alive."""
    future: Future[Done] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="treepo-trl-ahead", daemon=True).start()
    return future


class SamplingUnderWay:
    """
    A sampling in a thread.

    Args:
        name (`str`):
            Of the batch.
        prompts (`list[list[int]]`):
            Token ids of this process's prompts.
        future (`Future`):
            Result of the thread.
        share (`Callable[[Callable], tuple[list[SegmentTree], dict[str, float]]]`):
            What this process makes of it. All processes call it together.
        ready (`ExitStack`):
            Closed when the engine is needed no more.
    """

    def __init__(
        self,
        name: str,
        prompts: list[list[int]],
        future: "Future[Any]",
        share: Callable[[Callable[[], Any]], Sampled],
        ready: ExitStack,
    ) -> None:
        self.name, self.prompts = name, prompts
        self._future, self._share, self._ready = future, share, ready
        self._result: Sampled | None = None

    def result(self) -> Sampled:
        """
        Wait for the trees. All processes call it together; an error of the thread is raised here, with its trace.
        """
        if self._result is None:
            with self._ready:
                self._result = self._share(self._future.result)
        return self._result

    def error(self) -> Exception | None:
        """Wait for the trees, and what `result` raises, if anything. All processes call it together."""
        try:
            self.result()
        except Exception as error:
            return error
        return None

    def discard(self) -> None:
        """Wait until the engine is free, for this process alone and whatever the outcome."""
        with self._ready:
            self._future.exception()

    # In checkpoints

    def write(self, path: Path) -> None:
        """Wait for the trees and write them; see `result`."""
        trees, totals = self.result()
        record = {"name": self.name, "prompts": self.prompts, "totals": totals, "trees": [t.to_dict() for t in trees]}
        path.write_text(json.dumps(record))

    @classmethod
    def read(cls, path: Path) -> "SamplingUnderWay":
        """
        What `write` has written.

        Raises:
            OSError, ValueError, KeyError or TypeError: if it is not that.
        """
        record = json.loads(path.read_text())
        done: Future[Sampled] = Future()
        done.set_result(([SegmentTree.from_dict(tree) for tree in record["trees"]], record["totals"]))
        return cls(record["name"], record["prompts"], done, lambda result: result(), ExitStack())
