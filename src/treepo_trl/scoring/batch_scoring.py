"""How `GRPOTrainer` scores a batch of trees: what stands around its method, and what is made of its result."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from treepo_trl.batch import TrainerTurns, TreeBatch, TreeSource
from treepo_trl.health.reward_signal import signal_metrics, signal_sums
from treepo_trl.metrics import sum_over_processes
from treepo_trl.policy.engine import PolicyEngine
from treepo_trl.trl import seams
from treepo_trl.trl.host import Host, Rows

from .evaluation import EvaluationMetrics
from .importance_ratio import ImportanceRatio
from .outcome import ROWS_PER_LEAF, judged
from .reward_watch import RewardWatch
from .rewards import BatchRewards
from .vacant_rows import LeafRows, generated


Output = dict[str, torch.Tensor]
"""What `GRPOTrainer._generate_and_score_completions` returns, which `score` stands for below."""


class BatchScoring:
    """
    Scores the batches of a training, and those of its evaluations.

    Args:
        host ([`Host`]):
            Settings, state and logs.
        source ([`TreeSource`]):
            Where the trees come from.
        turns ([`TrainerTurns`]):
            What the turns of the trees may call.
        engine ([`PolicyEngine`]):
            Has sampled them.
        decode (`Callable[[list[int]], str]`):
            Text of a list of tokens, for the tree log.

    Attributes:
        ratio ([`ImportanceRatio`]):
            Gets the policy's log-probabilities in the update.
    """

    def __init__(
        self,
        host: Host,
        source: TreeSource,
        turns: TrainerTurns,
        engine: PolicyEngine,
        decode: Callable[[list[int]], str],
    ) -> None:
        self._host, self._source, self._turns, self._engine, self._decode = host, source, turns, engine, decode
        self._watch, self._evaluation = RewardWatch(host), EvaluationMetrics(host)
        self._rewards = BatchRewards(host, self._watch, source)
        self.ratio = ImportanceRatio(host, engine)

    def evaluated(self, inputs: Rows, score: Callable[[Rows], Output]) -> Output:
        """Independent completions, scored, with what is logged of their groups."""
        with seams.calculated_rewards(self._host.trainer, self._evaluation.logging):
            return score(inputs)

    def trained_on(self, batch: TreeBatch, inputs: Rows, score: Callable[[Rows], Output]) -> Output:
        """The rows of a batch of trees, scored, with the advantages of the trees."""
        trainer = self._host.trainer
        kept_rewards = seams.calculated_rewards(trainer, partial(self._rewards.kept_in, batch))
        masked_rows = seams.generated(trainer, partial(generated, self._host, batch))
        with batch.opened(), self._turns.opened(), kept_rewards, masked_rows, self.ratio.scoring():
            output = score(self._source.rows_for(batch, inputs))
        rewards, divisors = self._rewards.combined(batch)
        self._host.log(self._metrics(batch, rewards / divisors, output))
        output = judged(batch, output, rewards, divisors, self._host, self._decode)
        self.ratio.scored(output)
        return output

    def watched_functions(self, batch: TreeBatch, num_rows: int) -> AbstractContextManager[None]:
        """Context in which `GRPOTrainer` calls each reward function for the leaves among its rows, watched."""
        is_vacant = batch.is_vacant if self._host.model.training else []
        rows = LeafRows(is_vacant if len(is_vacant) == num_rows else [False] * num_rows)
        return seams.reward_funcs(self._host.trainer, self._watch.functions(rows))

    def is_filled(self, batch: TreeBatch, completion_mask: torch.Tensor) -> torch.Tensor:
        """Which of the rows `(B,)` have anything to be scored, by their mask `(B, T)` and the batch under way."""
        is_filled = completion_mask.any(1)
        if batch.is_open and len(batch.is_vacant) == len(is_filled):
            is_filled &= ~torch.tensor(batch.is_vacant, device=is_filled.device)
        return is_filled

    @contextmanager
    def loss_of(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Context in which `GRPOTrainer` computes the loss of a micro-batch."""
        trainer = self._host.trainer
        beta = trainer.beta * float(inputs.get(ROWS_PER_LEAF, 1.0))
        with seams.kl_weight(trainer, beta), self.ratio.filled_in(inputs):
            yield

    def _metrics(self, batch: TreeBatch, scaled_rewards: torch.Tensor, output: Output) -> dict[str, float]:
        """What the batch has cost and shown, and how far the engine was from the policy."""
        signal = signal_sums(batch.trees, batch.by_tree(scaled_rewards.tolist()))
        shown = signal_metrics(sum_over_processes(signal, self._host.accelerator))
        return shown | self._source.metrics(batch, scaled_rewards) | self._engine.compare(output)
