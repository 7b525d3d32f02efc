"""Trees from a trainer's engine while it holds the current policy, and what they have cost and shown."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.metrics import reduce_totals, tree_metrics, tree_totals, turn_metrics
from treepo_trl.policy.engine import PolicyEngine
from treepo_trl.sampling import SamplingStats, SegmentTree, TreeSampler
from treepo_trl.sampling.turns import TurnHandler
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.turns.conversations import Conversation

from .sampling_under_way import Sampled, SamplingUnderWay, in_thread
from .trainer_turns import TrainerTurns
from .tree_batch import TreeBatch
from .width_schedule import WidthSchedule


logger = get_logger(__name__)


class BatchSampler:
    """
    Samples the trees of a trainer's batches.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Has the settings and the state of the training.
        sampler ([`TreeSampler`]):
            Grows the trees.
        policy_engine ([`PolicyEngine`]):
            The engine that the sampler drives.
        turns ([`TrainerTurns`]):
            Answers turns.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        sampler: TreeSampler,
        policy_engine: PolicyEngine,
        turns: TrainerTurns,
    ) -> None:
        self._trainer, self._sampler, self._turns = trainer, sampler, turns
        self._policy_engine = policy_engine
        _warn_of_short_segments(sampler)
        self._width_schedule = WidthSchedule(cast(TreePOConfig, trainer.args))
        self._under_way: SamplingUnderWay | None = None

    def sample(
        self,
        batch: TreeBatch,
        prompts: list[list[int]],
        conversations: Sequence[Conversation],
        round_number: int = 0,
    ) -> list[SegmentTree]:
        """Sample the trees of this process's prompts, together with those of processes that share its engine."""
        trees = self._sample(batch, prompts, self._turns.handler(conversations), round_number)
        batch.totals.append(tree_totals(trees, self._sampler.stats, self._policy_engine.processes_per_engine))
        return trees

    def sample_for_user(
        self, batch: TreeBatch, prompts: list[list[int]], turns: TurnHandler | None
    ) -> list[SegmentTree]:
        """Sample trees that may or may not become those of the batch."""
        model = cast(PreTrainedModel, self._trainer.model)
        is_training = model.training
        batch.num_sampled += 1
        try:
            return self._sample(batch, prompts, turns)
        finally:
            model.train(is_training)

    def begin(self, batch: TreeBatch, prompts: list[list[int]]) -> SamplingUnderWay:
        """
        Sample the trees of a later batch in a thread, from the policy as it is now.

        The engine has the policy when this returns. Whatever samples next waits for the thread.
        """
        self.wait()
        ready = ExitStack()
        sample, own = self._prepared(ready, batch, prompts, None, 0, in_batch=True)
        engine = self._policy_engine
        future = in_thread(sample if engine.samples_here else lambda: None)

        def share(result: Callable[[], tuple[list[SegmentTree], SamplingStats]]) -> Sampled:
            trees, stats = engine.shared(result)
            return trees[own], tree_totals(trees[own], stats, engine.processes_per_engine)

        self._under_way = SamplingUnderWay(batch.name, prompts, future, share, ready)
        return self._under_way

    def wait(self) -> None:
        """
        Wait until nothing is sampled in a thread: the engine is free. All processes call it together.

        An error of the thread is of those who need its trees.
        """
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.error()

    def drop(self) -> None:
        """Wait until this process samples nothing in a thread, whatever comes of it."""
        if self._under_way is not None:
            self._under_way.discard()
            self._under_way = None

    def _sample(
        self, batch: TreeBatch, prompts: list[list[int]], turns: TurnHandler | None, round_number: int = 0
    ) -> list[SegmentTree]:
        self.wait()
        with ExitStack() as ready:
            sample, own = self._prepared(ready, batch, prompts, turns, round_number, in_batch=batch.is_open)
            trees, self._sampler.stats = self._policy_engine.shared(sample)
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
        trainer, num_processes = self._trainer, self._policy_engine.processes_per_engine
        args, state = cast(TreePOConfig, trainer.args), trainer.state
        seed = f"{args.seed}/{batch.name}/{trainer.accelerator.process_index // num_processes}"
        seed += f"/{round_number}" if round_number > 0 else ""
        gathered, own = self._policy_engine.gather(prompts)
        ready.enter_context(self._policy_engine.ready(seed, gathered, in_batch=in_batch))
        sampler, schedule = self._sampler, self._width_schedule
        # Asked now: a thread would find what later batches have shown.
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
        trainer = self._trainer
        totals = reduce_totals(batch.summed_totals() | self._turns.totals(), trainer.accelerator)
        metrics = tree_metrics(totals) | (turn_metrics(totals) if self._turns.is_used else {})
        if cast(TreePOConfig, trainer.args).dynamic_sampling_rounds > 0:
            metrics["dynamic_sampling/discarded_tokens"] = totals["unique_tokens"] - totals["kept_tokens"]
        mean_length = metrics["tree/mean_length"]
        return metrics | self._width_schedule.learn(
            trainer.state, mean_length, batch.trees, scaled_rewards, trainer.accelerator
        )


def _warn_of_short_segments(sampler: TreeSampler) -> None:
    """Not of short completions, which hold no more than two blocks and so share little in any case."""
    block, segment = sampler.engine.block_size, sampler.config.segment_length
    if block is not None and segment is not None and segment < block < sampler.config.max_completion_length / 2:
        logger.warning(
            f"Segments of {segment} tokens are shorter than a block of the engine's cache. It keeps whole blocks of "
            f"{block}, so much of what paths share is computed again. A `segment_length` of {block} or more shares it."
        )
