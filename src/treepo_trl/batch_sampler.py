"""Trees from a trainer's engine while it holds the current policy, and what they have cost and shown."""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedModel
from trl.trainer.grpo_trainer import GRPOTrainer

from .metrics import reduce_totals, tree_metrics, tree_totals, turn_metrics
from .policy.engine import PolicyEngine
from .sampling import SamplingStats, SegmentTree, TreeSampler
from .sampling.turns import TurnHandler
from .trainer_turns import TrainerTurns
from .tree_batch import TreeBatch
from .treepo_config import TreePOConfig
from .turns.conversations import Conversation
from .width_schedule import WidthSchedule


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
        self._width_schedule = WidthSchedule(cast(TreePOConfig, trainer.args))

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

    def _sample(
        self, batch: TreeBatch, prompts: list[list[int]], turns: TurnHandler | None, round_number: int = 0
    ) -> list[SegmentTree]:
        trainer, num_processes = self._trainer, self._policy_engine.processes_per_engine
        args, state = cast(TreePOConfig, trainer.args), trainer.state
        seed = f"{args.seed}/{batch.name}/{trainer.accelerator.process_index // num_processes}"
        seed += f"/{round_number}" if round_number > 0 else ""
        prompts, own = self._policy_engine.gather(prompts)
        sampler, schedule = self._sampler, self._width_schedule

        def sample() -> tuple[list[SegmentTree], SamplingStats]:
            trees = sampler.sample(
                prompts,
                seed,
                progress=state.global_step / max(state.max_steps, 1),
                expected_length=schedule.expected_length(state),
                widths=schedule.widths(state),
                turns=turns,
            )
            return trees, sampler.stats

        with self._policy_engine.ready(seed, prompts, in_batch=batch.is_open):
            trees, sampler.stats = self._policy_engine.shared(sample)
        return trees[own]

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
