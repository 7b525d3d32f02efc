"""
What each segment of a tree counts in the policy gradient: its advantage times the weight of its path.

A fallback grows paths because of how earlier ones ended, so its leaves say nothing about those, and nothing about the
segments that they share with them. Behind its stem such a path is a fresh sample like any other. So it counts there
alone, and earlier paths are judged without it.
"""

import torch

from treepo_trl.sampling.tree import SegmentTree

from .advantages import leaf_scores, tree_advantages, values_at


def weighted_advantages(
    trees: list[SegmentTree],
    ids: torch.Tensor,
    rewards: torch.Tensor,
    estimator: str,
    subgroup_rejection: bool = False,
) -> torch.Tensor:
    """
    Advantages times weights: summed over leaves, an estimate of the policy gradient with the exact estimators.

    A leaf that branching made has its weight by [`SegmentTree.leaf_weights`] on its whole path. One of a fallback has
    1 / W behind its stem, 0 on it. With fallbacks to the prompt the mean is the policy gradient times 1 + (leaves of
    fallbacks) / W in the mean, since they are independent trees whose number is known before they grow. With other
    stems the gradient at these prefixes comes on top.

    Args:
        trees (`list[SegmentTree]`):
            T trees with W leaves each.
        ids (`torch.Tensor` of shape `(T, W, D)`):
            Node id of each leaf's ancestor per depth, -1 past the leaf; see [`leaf_paths`].
        rewards (`torch.Tensor` of shape `(T, W)`):
            Reward of each leaf; `nan` marks one that could not be scored.
        estimator (`str`), subgroup_rejection (`bool`):
            As in [`tree_advantages`].

    Returns:
        `torch.Tensor` of shape `(T, W, D)`: 0 past the leaf, for unscorable leaves, and on the stem of a fallback.
    """
    weights = torch.tensor([tree.leaf_weights() for tree in trees], dtype=rewards.dtype)
    scores = leaf_scores(trees) if estimator == "optimal_baseline" else None
    node_waves = values_at(ids, [[node.wave for node in tree.nodes] for tree in trees])
    waves = node_waves.amax(-1)  # along a path they never fall
    weights = torch.where(waves > 0, 1 / waves.size(1), weights)
    result = torch.zeros(ids.shape, dtype=rewards.dtype)
    for wave in range(int(waves.max()) + 1):
        seen = rewards.masked_fill(waves > wave, torch.nan)  # whether there are later ones depends on this one
        values = tree_advantages(
            seen, ids, estimator, subgroup_rejection=subgroup_rejection, leaf_weights=weights, leaf_scores=scores
        )
        is_own = (waves == wave)[:, :, None] & (node_waves == wave)
        result = torch.where(is_own, values * weights[:, :, None], result)
    return result
