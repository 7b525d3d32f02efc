"""Rewards of a batch: from what `GRPOTrainer` calculates to one number per row and its divisor."""

from collections.abc import Callable

import torch

from treepo_trl.batch import TreeBatch, TreeSource
from treepo_trl.trl.host import Host
from treepo_trl.update.rewards import combine_rewards

from .reward_watch import RewardWatch


class BatchRewards:
    """
    Keeps the rewards of a batch, which `GRPOTrainer` does not hand out.

    Args:
        host ([`Host`]):
            Says how rewards are combined.
        watch ([`RewardWatch`]):
            Knows rewards that no training can use.
        source ([`TreeSource`]):
            May have scored the batch already.
    """

    def __init__(self, host: Host, watch: RewardWatch, source: TreeSource) -> None:
        self._host, self._watch, self._source = host, watch, source

    def kept_in(self, batch: TreeBatch, calculate_rewards: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`calculate_rewards` whose result is usable and stays in the batch; not called for rewards that are there."""

        def calculate(inputs: object, prompts: list[object], *args: object, **kwargs: object) -> torch.Tensor:
            rewards = self._source.rewards_for(batch)
            if rewards is None:
                given = calculate_rewards(inputs, prompts, *args, **kwargs)
                rewards = batch.without_missing(self._watch.usable(given, prompts), self._host.accelerator)
            batch.rewards_per_func = rewards
            return rewards

        return calculate

    def combined(self, batch: TreeBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward of each row and what its advantage is divided by, `(B,)` each, as the trainer has set."""
        assert batch.rewards_per_func is not None, "GRPOTrainer scores every completion"
        host = self._host
        rewards, divisors = combine_rewards(
            batch.rewards_per_func,
            host.reward_weights,
            host.num_generations,
            host.trainer.multi_objective_aggregation,
            host.trainer.scale_rewards,
        )
        num_rows = len(rewards) // host.accelerator.num_processes
        own = slice(host.accelerator.process_index * num_rows, (host.accelerator.process_index + 1) * num_rows)
        return rewards[own], divisors[own]
