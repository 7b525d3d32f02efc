"""`combine_rewards` against GRPOTrainer's own formulas and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from treepo_trl.update.rewards import LARGEST_REWARD, combine_rewards, without_unusable


nan = math.nan


def grpo_advantages(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, num_generations: int, aggregation: str, scale: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and advantages as trl/trainer/grpo_trainer.py (1.16) computes them, copied."""
    unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)
    if aggregation == "sum_then_normalize":
        rewards = (rewards_per_func * weights.unsqueeze(0)).nansum(dim=1)
        rewards[unscorable_mask] = torch.nan
        mean_grouped_rewards = torch.nanmean(rewards.view(-1, num_generations), dim=1)
        mean_grouped_rewards = mean_grouped_rewards.repeat_interleave(num_generations, dim=0)
        if scale in ["group", "none"]:
            std_rewards = nanstd(rewards.view(-1, num_generations), dim=1)
            std_rewards = std_rewards.repeat_interleave(num_generations, dim=0)
        else:
            std_rewards = nanstd(rewards).expand_as(rewards)
        advantages = rewards - mean_grouped_rewards
        if scale != "none":
            advantages = advantages / (std_rewards + 1e-4)
    else:
        grouped = rewards_per_func.view(-1, num_generations, rewards_per_func.size(1))
        mean_k = torch.nanmean(grouped, dim=1, keepdim=True)
        std_k = nanstd(grouped, dim=1, keepdim=True)
        reward_k = ((grouped - mean_k) / (std_k + 1e-4)).view(-1, rewards_per_func.size(1))
        rewards = (reward_k * weights.unsqueeze(0)).nansum(dim=1)
        rewards[unscorable_mask] = torch.nan
        std_rewards = nanstd(rewards).expand_as(rewards)
        advantages = (rewards - torch.nanmean(rewards)) / (std_rewards + 1e-4)
    return rewards, torch.nan_to_num(advantages, nan=0.0)


@st.composite
def reward_tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    groups, generations, functions = draw(st.integers(1, 4)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    values = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0, *draw(st.sampled_from([[], [nan, nan]]))])
    rows = draw(st.lists(values, min_size=groups * generations * functions, max_size=groups * generations * functions))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=functions, max_size=functions))
    table = torch.tensor(rows, dtype=torch.float64).view(-1, functions)
    return table, torch.tensor(weights, dtype=torch.float64), generations


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])  # the second ignores the scale
@given(reward_tables())
def test_rewards_and_divisors_are_those_of_grpo(
    aggregation: str, scale: str, table: tuple[torch.Tensor, torch.Tensor, int]
) -> None:
    rewards_per_func, weights, generations = table
    before = rewards_per_func.clone()
    rewards, divisors = combine_rewards(rewards_per_func, weights, generations, aggregation, scale)
    torch.testing.assert_close(rewards_per_func, before, equal_nan=True)
    expected_rewards, expected = grpo_advantages(rewards_per_func, weights, generations, aggregation, scale)
    torch.testing.assert_close(rewards, expected_rewards, equal_nan=True)
    means = rewards.view(-1, generations).nanmean(1).repeat_interleave(generations)
    if aggregation == "normalize_then_sum":
        if not rewards_per_func.isnan().any():  # the mean of a tree's query group is the one that GRPO subtracts
            torch.testing.assert_close(means, torch.zeros_like(means))
        means = rewards.nanmean()
    # The trainer divides by 1 where there is no standard deviation; the numerator is 0 there or the leaf unscorable.
    advantages = torch.nan_to_num((rewards - means) / torch.nan_to_num(divisors, nan=1.0), nan=0.0)
    torch.testing.assert_close(advantages, expected)


def test_rewards_that_are_infinite_or_too_large_are_unscorable() -> None:
    rewards = torch.tensor([[math.inf, -math.inf, 2 * LARGEST_REWARD], [-2 * LARGEST_REWARD, -LARGEST_REWARD, 0.5]])
    expected = torch.tensor([[nan] * 3, [nan, -LARGEST_REWARD, 0.5]])
    torch.testing.assert_close(without_unusable(rewards), expected, equal_nan=True)
    # Of 1e8 rewards of the largest usable size, float32 still holds the sum of squares.
    assert torch.isfinite(1e8 * torch.tensor(LARGEST_REWARD).square())
