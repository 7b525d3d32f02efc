"""
Where the trees of a batch come from.

A [`TreeSource`] samples them when they are asked for. [`AheadSource`] has sampled them one step before, and
[`DynamicSource`] chooses their prompts too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.logging import get_logger

from treepo_trl.checkpoints import saved_values
from treepo_trl.metrics import reduce_totals, tree_metrics, tree_totals, turn_metrics
from treepo_trl.policy.engine import PolicyEngine
from treepo_trl.sampling import SamplingStats, SegmentTree, TreeSampler
from treepo_trl.sampling.turns import TurnHandler
from treepo_trl.trl.host import Host, Rows
from treepo_trl.turns.conversations import Conversation

from .tree_batch import SamplingUnderWay, TreeBatch
from .turns import TrainerTurns
from .width_schedule import WidthSchedule


logger = get_logger(__name__)

# In the state that checkpoints save, of the source that chooses prompts:
PROMPTS_DRAWN = "treepo_prompts_drawn"  # pass over the dataset and examples drawn
PASS_RATES = "treepo_pass_rates"


class TreeSource:
    """
    Trees from a trainer's engine while it holds the current policy, and what they have cost and shown.

    Args:
        host ([`Host`]):
            Has the settings and the state of the training.
        sampler ([`TreeSampler`]):
            Grows the trees.
        engine ([`PolicyEngine`]):
            The engine that the sampler drives.
        turns ([`TrainerTurns`]):
            Answers turns.

    Attributes:
        pending ([`SamplingUnderWay`], *optional*):
            The next batch, if it is sampled ahead.
    """

    def __init__(self, host: Host, sampler: TreeSampler, engine: PolicyEngine, turns: TrainerTurns) -> None:
        self._host, self._sampler, self._engine, self._turns = host, sampler, engine, turns
        _warn_of_short_segments(sampler)
        self._width_schedule = WidthSchedule(host.args)
        self.pending: SamplingUnderWay | None = None

    def trees_for(self, batch: TreeBatch, prompts: list[list[int]]) -> list[SegmentTree]:
        """The trees of this process's prompts, of which `GRPOTrainer` is about to take the rows."""
        conversations = self._turns.of_rows(len(prompts))
        try:
            return self.sample(batch, prompts, conversations)
        finally:
            batch.num_sampled += 1

    def sample(
        self,
        batch: TreeBatch,
        prompts: list[list[int]],
        conversations: Sequence[Conversation],
        round_number: int = 0,
    ) -> list[SegmentTree]:
        """Sample the trees of this process's prompts, together with those of processes that share its engine."""
        trees = self._sampled(batch, prompts, self._turns.handler(conversations), round_number)
        batch.totals.append(tree_totals(trees, self._sampler.stats, self._engine.processes_per_engine))
        return trees

    def sample_for_user(
        self, batch: TreeBatch, prompts: list[list[int]], turns: TurnHandler | None
    ) -> list[SegmentTree]:
        """Sample trees that may or may not become those of the batch."""
        model = self._host.model
        is_training = model.training
        batch.num_sampled += 1
        try:
            return self._sampled(batch, prompts, turns)
        finally:
            model.train(is_training)

    def _sampled(
        self, batch: TreeBatch, prompts: list[list[int]], turns: TurnHandler | None, round_number: int = 0
    ) -> list[SegmentTree]:
        self.wait()
        with ExitStack() as ready:
            sample, own = self._prepared(ready, batch, prompts, turns, round_number, in_batch=batch.is_open)
            trees, self._sampler.stats = self._engine.shared(sample)
        return trees[own]

    def _prepared(
        self,
        ready: ExitStack,
        batch: TreeBatch,
        prompts: list[list[int]],
        turns: TurnHandler | None,
        round_number: int,
        in_batch: bool,
    ) -> tuple[Callable[[], tuple[list[SegmentTree], SamplingStats]], slice]:
        """What samples, while `ready` is open, the trees of all processes of an engine; and which are this one's."""
        host, num_processes = self._host, self._engine.processes_per_engine
        seed = f"{host.args.seed}/{batch.name}/{host.accelerator.process_index // num_processes}"
        seed += f"/{round_number}" if round_number > 0 else ""
        gathered, own = self._engine.gather(prompts)
        ready.enter_context(self._engine.ready(seed, gathered, in_batch=in_batch))
        sampler, schedule, state = self._sampler, self._width_schedule, host.state
        # These are asked now: a thread would find what later batches have shown.
        expected_length, widths = schedule.expected_length(state), schedule.widths(state)
        progress = batch.step / max(state.max_steps, 1)

        def sample() -> tuple[list[SegmentTree], SamplingStats]:
            trees = sampler.sample(
                gathered, seed, progress=progress, expected_length=expected_length, widths=widths, turns=turns
            )
            return trees, sampler.stats

        return sample, own

    def metrics(self, batch: TreeBatch, scaled_rewards: torch.Tensor) -> dict[str, float]:
        """
        What a batch has cost and shown; the next ones take their widths from it.

        Args:
            batch ([`TreeBatch`]):
                A batch that is scored.
            scaled_rewards (`torch.Tensor` of shape `(B,)`):
                Reward of each row over what its advantage is divided by.
        """
        host = self._host
        totals = reduce_totals(batch.summed_totals() | self._turns.totals(), host.accelerator)
        metrics = tree_metrics(totals) | (turn_metrics(totals) if self._turns.is_used else {})
        if host.args.dynamic_sampling_rounds > 0:
            metrics["dynamic_sampling/discarded_tokens"] = totals["unique_tokens"] - totals["kept_tokens"]
        mean_length = metrics["tree/mean_length"]
        of_leaves = batch.by_tree(scaled_rewards.tolist())
        return metrics | self._width_schedule.learn(host.state, mean_length, batch.trees, of_leaves, host.accelerator)

    # What the other sources do in addition

    def rows_for(self, batch: TreeBatch, rows: Rows) -> Rows:
        """The rows of a batch that begins, from those of the data loader."""
        for name in (PROMPTS_DRAWN, PASS_RATES):  # a training that does not choose its prompts draws them otherwise
            saved_values(self._host.state).pop(name, None)
        return rows

    def rewards_for(self, batch: TreeBatch) -> torch.Tensor | None:
        """Rewards of a batch, as `TreeBatch.rewards_per_func`, if its completions were scored to choose them."""
        return None

    def loader_dataset(self) -> torch.utils.data.Dataset | None:
        """What the data loader reads in place of the dataset of a source that draws prompts itself."""
        return None

    def look_ahead(self, epoch_iterator: Iterator[Rows]) -> Iterator[Rows]:
        """What the micro-batches of an epoch are to be taken from."""
        return epoch_iterator

    def wait(self) -> None:
        """Wait until the engine is free. All processes call it together."""

    def end(self) -> None:
        """Forget what is being sampled: the training is over."""

    def restore(self, path: Path) -> None:
        """Take up what a checkpoint holds of the next batch."""


def _warn_of_short_segments(sampler: TreeSampler) -> None:
    """Not of short completions, which hold no more than two blocks and so share little in any case."""
    block, segment = sampler.engine.block_size, sampler.config.segment_length
    if block is not None and segment is not None and segment < block < sampler.config.max_completion_length / 2:
        logger.warning(
            f"Segments of {segment} tokens are shorter than a block of the engine's cache. It keeps whole blocks of "
            f"{block}, so much of what paths share is computed again. A `segment_length` of {block} or more shares it."
        )
