"""
The next batch's trees are sampled while this one's update runs (`rollout_ahead=1`).

Batch t+1 is sampled with the policy before update t, and scored when it is used. The engine's log-probabilities and
those of the policy at use give TRL's importance ratio, which corrects both what differs between engine and policy and
that the trees are one update old. A tree is sampled from one policy alone, and no batch is two updates old.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar, cast

from accelerate.logging import get_logger
from accelerate.utils import gather_object

from treepo_trl.metrics import tree_totals
from treepo_trl.sampling import SamplingStats, SegmentTree
from treepo_trl.settings.data import check_rows
from treepo_trl.trl.host import Rows

from .source import TreeSource
from .tree_batch import Sampled, SamplingUnderWay, TreeBatch, prompts_of_trees


logger = get_logger(__name__)

Done = TypeVar("Done")


class AheadSource(TreeSource):
    """
    Takes what was sampled ahead for a batch, and begins to sample the next one.

    The first batch of a training and of each epoch is sampled when it is used.
    """

    _epoch: "LookAhead | None" = None
    _under_way: SamplingUnderWay | None = None

    def look_ahead(self, epoch_iterator: Iterator[Rows]) -> Iterator[Rows]:
        if self._epoch is None or self._epoch.iterator is not epoch_iterator:
            if self._epoch is not None:
                self.end()  # the epoch before was left in its middle
            self._epoch = LookAhead(epoch_iterator)
        return self._epoch

    def trees_for(self, batch: TreeBatch, prompts: list[list[int]]) -> list[SegmentTree]:
        """
        The trees of this process's prompts, from ahead if there are any; then the next batch is begun.

        Raises:
            RuntimeError: if other prompts were sampled ahead.
        """
        trees = self._sampled_ahead(batch, prompts)
        if trees is None:
            trees = super().trees_for(batch, prompts)
        if self.pending is None:
            self._begin_next()
        return trees

    def _sampled_ahead(self, batch: TreeBatch, prompts: list[list[int]]) -> list[SegmentTree] | None:
        pending = self.pending
        if pending is None or pending.name != batch.name:
            return None
        if pending.prompts != prompts:
            raise RuntimeError(
                "Other prompts were sampled ahead than this batch has: they are not those that the data loader gave. "
                "Set `rollout_ahead=0` with a subclass that changes prompts or their order."
            )
        self.pending = None
        trees, totals = pending.result()
        batch.totals.append(totals)
        batch.num_sampled += 1
        return trees

    def _begin_next(self) -> None:
        """Sample the next batch of the epoch in a thread, if the training gets there."""
        host = self._host
        accumulation, window = host.args.gradient_accumulation_steps, host.args.micro_steps_per_batch
        missing = window - host.micro_steps % window  # micro-batches until the next batch
        step = host.state.global_step + missing // accumulation
        if self._epoch is None or step >= host.state.max_steps:
            return
        rows = self._epoch.peek(missing - accumulation)  # those of the step under way were taken together
        if rows is None:
            return
        check_rows(host.trainer, rows)
        prompts = prompts_of_trees(host.tokenized([row["prompt"] for row in rows]), host.num_generations)
        self.pending = self._begin(TreeBatch(step, host.num_generations), prompts)

    def _begin(self, batch: TreeBatch, prompts: list[list[int]]) -> SamplingUnderWay:
        """
        Sample the trees of a later batch in a thread, from the policy as it is now.

        The engine has the policy when this returns. Whatever samples next waits for the thread.
        """
        self.wait()
        ready = ExitStack()
        sample, own = self._prepared(ready, batch, prompts, None, 0, in_batch=True)
        engine = self._engine
        future = in_thread(sample if engine.samples_here else lambda: None)

        def share(result: Callable[[], tuple[list[SegmentTree], SamplingStats]]) -> Sampled:
            trees, stats = engine.shared(result)
            return trees[own], tree_totals(trees[own], stats, engine.processes_per_engine)

        self._under_way = SamplingUnderWay(batch.name, prompts, future, share, ready)
        return self._under_way

    def wait(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.error()  # which is of those who need its trees

    def end(self) -> None:
        """Wait for what this process samples, whatever comes of it, and forget it."""
        if self._under_way is not None:
            self._under_way.discard()
        self._under_way = self.pending = self._epoch = None

    def restore(self, path: Path) -> None:
        """
        Take up what a checkpoint holds of the next batch, if all processes can read it.

        Checkpoints hold its trees: sampled again, they would be from another policy.
        """
        pending, reason = None, None
        try:
            if path.exists():
                pending = SamplingUnderWay.read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{path.name} cannot be read ({type(error).__name__}: {error})"
        found = cast("list[tuple[bool, str | None]]", gather_object([(pending is not None, reason)]))
        if all(is_there for is_there, _ in found):
            self.pending = pending
            return
        reasons = [each for _, each in found if each is not None]
        if reasons or any(is_there for is_there, _ in found):  # on any process: they sample together
            logger.warning(
                f"{path.parent} holds the next batch, but {(reasons or ['not of every process'])[0]}. It is sampled "
                "anew, from a policy that is one update newer: this is not the curve of a training that was not "
                "interrupted."
            )


class LookAhead(Iterator[Rows]):
    """The micro-batches of an epoch, of which those to come can be seen."""

    def __init__(self, iterator: Iterator[Rows]) -> None:
        self.iterator = iterator
        self._seen: deque[Rows] = deque()

    def __next__(self) -> Rows:
        return self._seen.popleft() if self._seen else next(self.iterator)

    def peek(self, index: int) -> Rows | None:
        """The micro-batch after `index` others, `None` behind the end of the epoch."""
        while len(self._seen) <= index:
            rows = next(self.iterator, None)
            if rows is None:
                return None
            self._seen.append(rows)
        return self._seen[index]


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
