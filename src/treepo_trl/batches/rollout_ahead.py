"""
The next batch's trees are sampled while this one's update runs (`rollout_ahead=1`).

Batch t+1 is sampled with the policy before update t, and scored when it is used. The engine's log-probabilities and
those of the policy at use give TRL's importance ratio, which corrects both what differs between engine and policy and
that the trees are one update old. A tree is sampled from one policy alone, and no batch is two updates old.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.sampling import SegmentTree
from treepo_trl.settings.data import check_rows
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.turns.conversations import Conversation

from .batch_sampler import BatchSampler
from .sampling_under_way import SamplingUnderWay
from .tree_batch import TreeBatch, prompts_of_trees


logger = get_logger(__name__)

Rows = list[dict[str, object]]


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


class RolloutAhead:
    """
    Takes what was sampled ahead for a batch, and begins to sample the next one.

    The first batch of a training and of each epoch is sampled when it is used.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Has the prompts and the state of the training.
        sampler ([`BatchSampler`]):
            Samples, at once or in a thread.

    Attributes:
        pending ([`SamplingUnderWay`], *optional*):
            The next batch.
    """

    def __init__(self, trainer: GRPOTrainer, sampler: BatchSampler) -> None:
        self._trainer, self._sampler = trainer, sampler
        self._args = cast(TreePOConfig, trainer.args)
        self._epoch: LookAhead | None = None
        self.pending: SamplingUnderWay | None = None

    def look_ahead(self, epoch_iterator: Iterator[Rows]) -> Iterator[Rows]:
        """What the micro-batches of an epoch are to be taken from."""
        if self._args.rollout_ahead == 0:
            return epoch_iterator
        if self._epoch is None or self._epoch.iterator is not epoch_iterator:
            if self._epoch is not None:
                self.end()  # the epoch before was left in its middle
            self._epoch = LookAhead(epoch_iterator)
        return self._epoch

    def sample(
        self, batch: TreeBatch, prompts: list[list[int]], conversations: Sequence[Conversation]
    ) -> list[SegmentTree]:
        """
        The trees of this process's prompts, from ahead if there are any; then the next batch is begun.

        Raises:
            RuntimeError: if other prompts were sampled ahead.
        """
        trees = self._sampled_ahead(batch, prompts)
        if trees is None:
            trees = self._sampler.sample(batch, prompts, conversations)
        if self._args.rollout_ahead > 0 and self.pending is None:
            self._begin()
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
        return trees

    def _begin(self) -> None:
        """Sample the next batch of the epoch in a thread, if the training gets there."""
        trainer, state = self._trainer, self._trainer.state
        accumulation, window = self._args.gradient_accumulation_steps, self._args.micro_steps_per_batch
        missing = window - cast(int, trainer._step) % window  # micro-batches until the next batch
        step = state.global_step + missing // accumulation
        if self._epoch is None or step >= state.max_steps:
            return
        rows = self._epoch.peek(missing - accumulation)  # those of the step under way were taken together
        if rows is None:
            return
        check_rows(trainer, rows)
        prompt_ids, _, _ = trainer._tokenize_prompts([row["prompt"] for row in rows])
        prompts = prompts_of_trees(prompt_ids, cast(int, trainer.num_generations))
        self.pending = self._sampler.begin(TreeBatch(step), prompts)

    def end(self) -> None:
        """Wait for what is being sampled, and forget it."""
        self._sampler.drop()
        self.pending = self._epoch = None

    # Checkpoints hold the trees: sampled again, they would be from another policy

    def restore(self, path: Path) -> None:
        """Take up what a checkpoint holds of the next batch, if all processes can read it."""
        pending, reason = None, None
        try:
            if self._args.rollout_ahead > 0 and path.exists():
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
