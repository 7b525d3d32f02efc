"""
From the rewards of leaves to an advantage per token of each row.

With weighted leaves each segment counts in the policy gradient with its advantage times the weight of its path.

A fallback grows paths because of how earlier ones ended, so its leaves say nothing about those, and nothing about the
segments that they share with them. Behind its stem such a path is a fresh sample like any other. So it counts there
alone, and earlier paths are judged without it.
"""

from collections.abc import Iterable

import torch
from torch.nn.utils.rnn import pad_sequence

from treepo_trl.sampling.tree import SegmentTree

from .advantages import EXACT_ESTIMATORS, expand_to_tokens, leaf_paths, leaf_scores, tree_advantages, values_at


def row_advantages(
    trees: list[SegmentTree],
    rewards: torch.Tensor,
    divisors: torch.Tensor,
    num_tokens: int,
    estimator: str,
    weights_leaves: bool,
    subgroup_rejection: bool = False,
    leaves_per_tree: float | None = None,
) -> torch.Tensor:
    """
    Tree advantages of each row's tokens.

    Args:
        trees (`list[SegmentTree]`):
            Whose leaves are the B rows, depth-first; equally many rows for each tree, the last of them vacant where it
            has fewer leaves.
        rewards (`torch.Tensor` of shape `(B,)`), divisors (`torch.Tensor` of shape `(B,)`):
            Reward of each row, and what its advantage is divided by.
        num_tokens (`int`):
            T: tokens of the longest row.
        estimator (`str`), subgroup_rejection (`bool`):
            As in [`tree_advantages`].
        weights_leaves (`bool`):
            Whether leaves count by their weight; see [`weighted_advantages`].
        leaves_per_tree (`float`, *optional*):
            Mean leaves of the trees of all processes, of which a weight is a multiple: the loss averages over leaves,
            so that a weight of 1 / `leaves_per_tree` is neutral. By default the rows of a tree.

    Returns:
        `torch.Tensor` of shape `(B, T)` on the device of the rewards; 0 past a row's end and in vacant rows.
    """
    # Small tensors and a few dozen operations: not on the device.
    shape = len(trees), len(rewards) // len(trees)
    ids, lengths = leaf_paths(trees, shape[1])
    of_leaves = rewards.cpu().view(shape)
    if weights_leaves or estimator in EXACT_ESTIMATORS:
        # Their baselines are differences of sums, of which one unsure completion may have nearly all. The others
        # round as GRPOTrainer does, whose clip ratios count the sign of what is left of equal rewards.
        of_leaves = of_leaves.double()
    if weights_leaves:
        advantages = weighted_advantages(trees, ids, of_leaves, estimator, subgroup_rejection)
        advantages = advantages * (leaves_per_tree or shape[1])
    else:
        scores = leaf_scores(trees, shape[1]) if estimator == "optimal_baseline" else None
        advantages = tree_advantages(
            of_leaves, ids, estimator, subgroup_rejection=subgroup_rejection, leaf_scores=scores
        )
    advantages = advantages / torch.nan_to_num(divisors.cpu().view(*shape, 1), nan=1.0)
    return expand_to_tokens(advantages, lengths, num_tokens).to(rewards)


def mean_advantages(rows: Iterable[tuple[SegmentTree, int | None]], advantages: torch.Tensor) -> torch.Tensor:
    """Mean `(B,)` of advantages `(B, T)` over the sampled tokens of each row, given its tree and its leaf, if any."""
    # TRL clears the completion mask of truncated completions, whose advantages are logged all the same.
    masks = [torch.tensor([0] if leaf is None else tree.sampled_mask(leaf)) for tree, leaf in rows]
    mask = torch.nn.functional.pad(pad_sequence(masks, batch_first=True), (0, advantages.size(1)))
    is_sampled = mask[:, : advantages.size(1)].to(advantages.device)
    return (advantages * is_sampled).sum(1) / is_sampled.sum(1).clamp(min=1)


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
            T trees with up to W leaves each.
        ids (`torch.Tensor` of shape `(T, W, D)`):
            Node id of each leaf's ancestor per depth, -1 past the leaf; see [`leaf_paths`].
        rewards (`torch.Tensor` of shape `(T, W)`):
            Reward of each leaf; `nan` marks one that could not be scored.
        estimator (`str`), subgroup_rejection (`bool`):
            As in [`tree_advantages`].

    Returns:
        `torch.Tensor` of shape `(T, W, D)`: 0 past the leaf, for unscorable leaves, and on the stem of a fallback.
    """
    width = ids.size(1)
    given = [tree.leaf_weights() for tree in trees]
    weights = torch.tensor([each + [0.0] * (width - len(each)) for each in given], dtype=rewards.dtype)
    scores = leaf_scores(trees, width) if estimator == "optimal_baseline" else None
    node_waves = values_at(ids, [[node.wave for node in tree.nodes] for tree in trees])
    waves = node_waves.amax(-1)  # along a path they never fall
    weights = torch.where(waves > 0, 1 / width, weights)
    result = torch.zeros(ids.shape, dtype=rewards.dtype)
    for wave in range(int(waves.max()) + 1):
        seen = rewards.masked_fill(waves > wave, torch.nan)  # whether there are later ones depends on this one
        values = tree_advantages(
            seen, ids, estimator, subgroup_rejection=subgroup_rejection, leaf_weights=weights, leaf_scores=scores
        )
        is_own = (waves == wave)[:, :, None] & (node_waves == wave)
        result = torch.where(is_own, values * weights[:, :, None], result)
    return result
