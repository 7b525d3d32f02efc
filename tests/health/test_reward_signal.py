"""What rewards say about prompts, by hand on small trees."""

import math

import pytest

from tests.support.tree_logs import small_tree
from treepo_trl.health.reward_signal import signal_metrics, signal_sums


def test_sums_and_metrics_by_hand() -> None:
    # The leaves of the tree have 4, 3 and 4 tokens. Rewards 1, 0 and nothing: deviations of 0.5 and -0.5 in both.
    rewards = [[1.0, 0.0, math.nan], [0.5, 0.5005, 0.5], [None, None, 3.0]]
    sums = signal_sums([small_tree()] * 3, rewards)
    # The second prompt is equal up to a thousandth, and a single reward of the third is equal to itself.
    second = 2 * (0.0005 / 3) ** 2 + (0.0005 * 2 / 3) ** 2
    assert sums == pytest.approx([3, 2, 0.5 + (-2 / 3) * 0.0005, 0.5 + second, 0.5 + 2 / 3])
    assert signal_metrics([3, 2, 0.5, 0.5, 2.0]) == {
        "tree/prompts": 3,
        "tree/equal_rewards_frac": 2 / 3,
        "tree/length_reward_correlation": 0.5,
    }


def test_sums_of_processes_add_up() -> None:
    trees, rewards = [small_tree(), small_tree()], [[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]]
    parts = [signal_sums(trees[i : i + 1], rewards[i : i + 1]) for i in range(2)]
    assert signal_sums(trees, rewards) == pytest.approx([sum(pair) for pair in zip(*parts, strict=True)])


def test_no_correlation_without_differences() -> None:
    assert signal_metrics(signal_sums([small_tree()], [[1.0, 1.0, 1.0]])) == {
        "tree/prompts": 1,
        "tree/equal_rewards_frac": 1.0,
    }
