"""From the rewards of several functions to one per completion, as `GRPOTrainer` does inside its scoring."""

import torch
from trl.trainer.utils import nanstd


# Deviations are sums of squares in float32, which ends at 3e38: of 1e8 rewards of this size they are still finite. And
# beside a reward of this size, float32 does not tell ordinary ones apart.
LARGEST_REWARD = 1e15


def combine_rewards(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, num_generations: int, aggregation: str, scale: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One reward per completion and what its advantage is divided by, as `GRPOTrainer` defines both.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(num_completions, num_reward_funcs)`):
            Rewards of whole groups of `num_generations`; `nan` where a function does not apply.
        weights (`torch.Tensor` of shape `(num_reward_funcs,)`):
            Weight of each reward function.
        num_generations (`int`):
            Completions per prompt.
        aggregation (`str`):
            `GRPOConfig.multi_objective_aggregation`.
        scale (`str`):
            `GRPOConfig.scale_rewards`: `"group"`, `"batch"` or `"none"`.

    Returns:
        Rewards, `nan` where every function gave `nan`, and divisors, both `(num_completions,)`.
    """
    is_unscorable = torch.isnan(rewards_per_func).all(dim=1)
    if aggregation == "normalize_then_sum":
        grouped = rewards_per_func.view(-1, num_generations, rewards_per_func.size(1))
        normalized = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
        rewards_per_func, scale = normalized.view_as(rewards_per_func), "batch"
    rewards = (rewards_per_func * weights).nansum(dim=1).masked_fill(is_unscorable, torch.nan)
    if scale == "group":
        divisors = nanstd(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations) + 1e-4
    elif scale == "batch":
        divisors = nanstd(rewards).expand_as(rewards) + 1e-4
    else:
        divisors = torch.ones_like(rewards)
    return rewards, divisors


def without_unusable(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards of any shape in which one that is infinite or too large counts as not scored (`nan`)."""
    return rewards.masked_fill(rewards.abs() > LARGEST_REWARD, torch.nan)
