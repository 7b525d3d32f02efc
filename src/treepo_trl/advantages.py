"""
Tree advantages: from the rewards of a tree's leaves to one value per segment of each leaf.

Pure torch; knows neither trainer nor engine.
"""

from typing import Literal, get_args

import torch

from .tree import SegmentTree


AdvantageEstimator = Literal["treepo", "treepo_size_weighted", "grpo"]


def tree_advantages(
    rewards: torch.Tensor,
    ancestor_ids: torch.Tensor,
    estimator: str,
    *,
    subgroup_rejection: bool = False,
    leaf_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Advantage of each segment of each leaf of one tree, not yet divided by a standard deviation.

    The subgroup `G_j` of leaf `i` at depth `j` holds the leaves that share its ancestor there; the query group holds
    all leaves. With `a_ij = R_i - mean(R over G_j)`:

    - `"grpo"`: `a_i` of the query group alone.
    - `"treepo"`: mean of `a_ij` over the leaf's groups, Eq. 5 of [TreePO](https://huggingface.co/papers/2508.17445).
    - `"treepo_size_weighted"`: mean of `a_ij` weighted by the groups' sizes, Eq. 6.

    The query group always counts. A subgroup of one says nothing about its leaf (`a_ij` is 0 by construction) and adds
    no term, as in the released code; Eq. 5 leaves this open. The paper divides by a standard deviation of the
    advantages; here the caller scales (see `TreePOTrainer`).

    Args:
        rewards (`torch.Tensor` of shape `(num_leaves,)`):
            Reward of each leaf. `nan` marks an unscorable leaf: it is left out of every mean and gets 0.
        ancestor_ids (`torch.Tensor` of shape `(num_leaves, max_tree_depth)`, int64):
            Node id of each leaf's ancestor per depth, its own node included; -1 past the leaf.
        estimator (`str`):
            One of the names above.
        subgroup_rejection (`bool`, *optional*, defaults to `False`):
            Leave out subgroups whose rewards are all equal (Eq. 7). The query group stays.
        leaf_weights (`torch.Tensor` of shape `(num_leaves,)`, *optional*):
            Weight of each leaf in the group means and group sizes, such as `SegmentTree.leaf_weights`. `None` weights
            all leaves equally.

    Returns:
        `torch.Tensor` of shape `(num_leaves, max_tree_depth)`: one value per segment, 0 past the leaf and for
        unscorable leaves. All three estimators give a leaf the same value in each of its segments.

    Raises:
        ValueError: if the shapes do not fit or the estimator is unknown.
    """
    if rewards.dim() != 1 or ancestor_ids.dim() != 2 or len(rewards) != len(ancestor_ids):
        raise ValueError(
            f"`rewards` must be (num_leaves,) and `ancestor_ids` (num_leaves, max_tree_depth); got "
            f"{tuple(rewards.shape)} and {tuple(ancestor_ids.shape)}."
        )
    if leaf_weights is not None and leaf_weights.shape != rewards.shape:
        raise ValueError(
            f"`leaf_weights` must be {tuple(rewards.shape)} like the rewards; got {tuple(leaf_weights.shape)}."
        )
    if estimator not in get_args(AdvantageEstimator):
        raise ValueError(f"`estimator` is {estimator!r}. Choose one of {', '.join(get_args(AdvantageEstimator))}.")
    is_scorable = ~torch.isnan(rewards)
    weights = torch.ones_like(rewards) if leaf_weights is None else leaf_weights.to(rewards)
    weights = weights * is_scorable
    values = torch.where(is_scorable, rewards, 0.0)

    # Groups of each leaf: the query group, then one per depth. (W, 1 + D, W), True where the last leaf is a member.
    is_ancestor = ancestor_ids >= 0
    same_node = (ancestor_ids[:, :, None] == ancestor_ids.T[None]) & is_ancestor[:, :, None]
    members = torch.cat([torch.ones_like(same_node[:, :1]), same_node], dim=1) & is_scorable
    group_weights = members * weights  # (W, 1 + D, W)
    sizes = group_weights.sum(-1)  # (W, 1 + D)
    baselines = group_weights @ values / sizes.clamp(min=torch.finfo(values.dtype).tiny)
    terms = values[:, None] - baselines

    counts = members.sum(-1) > 1
    if subgroup_rejection:
        highest = torch.where(members, values, -torch.inf).amax(-1)
        lowest = torch.where(members, values, torch.inf).amin(-1)
        counts &= highest > lowest
    if estimator == "grpo":
        counts[:, 1:] = False
    counts[:, 0] = True
    term_weights = counts * (sizes if estimator == "treepo_size_weighted" else torch.ones_like(sizes))
    advantages = (terms * term_weights).sum(1) / term_weights.sum(1).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(is_scorable & (sizes[:, 0] > 0), advantages, 0.0)[:, None] * is_ancestor


def ancestor_ids(tree: SegmentTree, leaves: list[int]) -> torch.Tensor:
    """
    Node id of each leaf's ancestor per depth, `(len(leaves), longest path)` int64; -1 past the leaf.
    """
    paths = [torch.tensor(tree.path(leaf)) for leaf in leaves]
    return torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1)


def expand_to_tokens(advantages: torch.Tensor, tree: SegmentTree, leaves: list[int], num_tokens: int) -> torch.Tensor:
    """
    Per-segment values `(len(leaves), max_tree_depth)` as per-token values `(len(leaves), num_tokens)`; 0 past the
    leaf.
    """
    expanded = advantages.new_zeros(len(leaves), num_tokens)
    for i, leaf in enumerate(leaves):
        path = tree.path(leaf)
        lengths = torch.tensor([len(tree.nodes[node].token_ids) for node in path], device=advantages.device)
        values = advantages[i, : len(path)].repeat_interleave(lengths)
        expanded[i, : len(values)] = values
    return expanded
