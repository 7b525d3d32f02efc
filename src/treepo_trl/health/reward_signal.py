"""What the rewards of trees say about the prompts: sums that add up over processes, and metrics of them. No torch."""

import math
from collections.abc import Sequence

from treepo_trl.sampling import SegmentTree


_EQUAL = 1e-3
"""Spread of scaled rewards, in units of what an advantage is divided by, below which they count as equal."""


def signal_sums(trees: Sequence[SegmentTree], rewards: Sequence[Sequence[float | None]]) -> list[float]:
    """
    Prompts, prompts without signal, and the second moments of length and reward around the means of each prompt.

    Args:
        trees (sequence of [`SegmentTree`]):
            A tree per prompt.
        rewards (sequence of sequences of `float` or `None`):
            Reward of each of their leaves over what its advantage is divided by; `None` or `nan` if it could not be
            scored.
    """
    sums = [0.0] * 5
    for tree, of_leaves in zip(trees, rewards, strict=True):
        pairs = [
            (reward, float(tree.nodes[leaf].end))
            for reward, leaf in zip(of_leaves, tree.leaves, strict=True)
            if reward is not None and not math.isnan(reward)
        ]
        is_equal = not pairs or max(pairs)[0] - min(pairs)[0] <= _EQUAL
        sums = [old + new for old, new in zip(sums, [1, is_equal, *_moments(pairs)], strict=True)]
    return sums


def signal_metrics(sums: Sequence[float]) -> dict[str, float]:
    """
    Metrics under `tree/` from sums over all processes.

    `prompts` is their number, `equal_rewards_frac` a fraction of them. `length_reward_correlation` between leaves of
    one prompt, from -1 to 1; it is left out if all lengths or all rewards of each prompt are equal.
    """
    prompts, equal, covariance, of_rewards, of_lengths = sums
    metrics = {"tree/prompts": prompts, "tree/equal_rewards_frac": equal / prompts}
    scale = math.sqrt(of_rewards * of_lengths)
    if scale > 0:
        metrics["tree/length_reward_correlation"] = max(-1.0, min(1.0, covariance / scale))
    return metrics


def _moments(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Sums of products: reward with length, reward with itself, length with itself, each less its mean."""
    if not pairs:
        return 0.0, 0.0, 0.0
    mean_reward = sum(reward for reward, _ in pairs) / len(pairs)
    mean_length = sum(length for _, length in pairs) / len(pairs)
    centred = [(reward - mean_reward, length - mean_length) for reward, length in pairs]
    return (
        sum(reward * length for reward, length in centred),
        sum(reward * reward for reward, _ in centred),
        sum(length * length for _, length in centred),
    )
