"""
Tree advantages: from the rewards of trees' leaves to one value per segment of each leaf.

Pure torch, linear in the segments, any number of trees at once; knows neither trainer nor engine.

Example:

```python
>>> ancestors = torch.tensor([[0, 1], [0, 2], [3, -1]])  # two leaves below node 0; node 3 is a leaf itself
>>> tree_advantages(torch.tensor([1.0, 0.0, 0.0]), ancestors, "value_difference")
tensor([[ 0.1667,  0.5000],
        [ 0.1667, -0.5000],
        [-0.3333,  0.0000]])

```
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from treepo_trl.sampling.tree import SegmentTree


AdvantageEstimator = Literal[
    "treepo",
    "treepo_size_weighted",
    "treepo_segment",
    "value_difference",
    "treerl",
    "leave_one_out",
    "optimal_baseline",
    "grpo",
]
"""The keys of `ESTIMATORS`, for type checkers. A test holds the two together."""


EXACT_ESTIMATORS = ("leave_one_out", "optimal_baseline")
"""Their mean is the policy gradient if weights undo the tilt of branching; that of the second up to a ratio's bias."""


@dataclass(frozen=True)
class _Groups:
    """
    The groups that each leaf belongs to: the query group, then the leaves that share its ancestor at each depth.

    T trees, W leaves each, D depths. Groups are nested, so along the last axis counts never grow.
    """

    rewards: torch.Tensor
    """`(T, W)`: 0 for unscorable leaves."""
    counts: torch.Tensor
    """`(T, W, 1 + D)`: scorable leaves of each group, 0 past the leaf."""
    sizes: torch.Tensor
    """`(T, W, 1 + D)`: their weights, summed."""
    sums: torch.Tensor
    """`(T, W, 1 + D)`: their rewards times weights, summed."""
    scored_sizes: torch.Tensor
    """`(T, W, 1 + D)`: their weights times scores, summed."""
    scored_sums: torch.Tensor
    """`(T, W, 1 + D)`: their rewards times weights and scores, summed."""
    is_used: torch.Tensor
    """`(T, W, 1 + D)` bool: the query group, and subgroups of two and more that are not rejected."""

    @property
    def means(self) -> torch.Tensor:
        """`(T, W, 1 + D)`: weighted mean reward of each group, the value V of its node."""
        return self.sums / self.sizes.clamp(min=torch.finfo(self.sizes.dtype).tiny)

    @property
    def terms(self) -> torch.Tensor:
        """`(T, W, 1 + D)`: `a_ij`, the leaf's reward minus the group's mean."""
        return self.rewards[:, :, None] - self.means


def tree_advantages(
    rewards: torch.Tensor,
    ancestor_ids: torch.Tensor,
    estimator: str,
    *,
    subgroup_rejection: bool = False,
    leaf_weights: torch.Tensor | None = None,
    leaf_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Advantage of each segment of each leaf of a tree, not yet divided by a standard deviation.

    The subgroup `G_j` of leaf `i` at depth `j` holds the leaves that share its ancestor there; the query group holds
    all leaves. With `a_ij = R_i - mean(R over G_j)` and the value `V` of a node, the mean reward of the leaves below:

    - `"grpo"`: `a_i` of the query group alone.
    - `"treepo"`: mean of `a_ij` over the leaf's groups, Eq. 5 of [TreePO](https://huggingface.co/papers/2508.17445).
    - `"treepo_size_weighted"`: mean of `a_ij` weighted by the groups' sizes, Eq. 6.
    - `"treepo_segment"`: for each segment the mean of `a_ij` over the groups that hold alternatives to it: the query
      group and those of the ancestors above it. Deeper groups share the segment and say nothing about it.
    - `"value_difference"`: `V` of the segment's node minus `V` of its parent.
    - `"treerl"`: `V` of the segment's node minus `V` of its parent, plus `V` of the node minus the mean of all leaves,
      divided by the square root of the number of leaves below the node.
    - `"leave_one_out"`: `V` of the segment's node minus the mean reward of the leaves that are not below it, near
      relatives counting most. No baseline depends on the segment that it judges, so with `leaf_weights` of a tree
      without fallback the expected update is the policy gradient.

    - `"optimal_baseline"`: `V` of the segment's node minus the mean reward of the leaves that are not below it, each
      weighted by the squared norm of its score.

    The query group always counts. A subgroup of one says nothing about its leaf (`a_ij` is 0 by construction) and adds
    no term, as in the released code; Eq. 5 leaves this open. The paper divides by a standard deviation of the
    advantages; here the caller scales (see `TreePOTrainer`).

    Args:
        rewards (`torch.Tensor` of shape `(num_leaves,)` or `(num_trees, num_leaves)`):
            Reward of each leaf. `nan` marks an unscorable leaf: it is left out of every mean and gets 0.
        ancestor_ids (`torch.Tensor` of shape `(num_leaves, max_tree_depth)` or `(num_trees, ...)`, int64):
            Node id of each leaf's ancestor per depth, its own node included; -1 past the leaf.
        estimator (`str`):
            One of the names above.
        subgroup_rejection (`bool`, *optional*, defaults to `False`):
            Leave out subgroups whose rewards are all equal (Eq. 7). The query group stays. Only for the three with
            `treepo` in their names: the others have no terms of groups.
        leaf_weights (`torch.Tensor` of the shape of `rewards`, *optional*):
            Weight of each leaf in the group means and group sizes, such as `SegmentTree.leaf_weights`. `None` weights
            all leaves equally.
        leaf_scores (`torch.Tensor` of the shape of `rewards`, *optional*):
            About the squared norm of each leaf's score, such as the sum of 1 - p over its tokens. Only for
            `"optimal_baseline"`; `None` takes all as equal.

    Returns:
        `torch.Tensor` of the shape of `ancestor_ids`: a value per segment, 0 past the leaf and for unscorable leaves.

    Raises:
        ValueError: if the shapes do not fit or the estimator is unknown.
    """
    if ancestor_ids.dim() not in (2, 3) or rewards.shape != ancestor_ids.shape[:-1]:
        raise ValueError(
            f"`rewards` must be (num_leaves,) and `ancestor_ids` (num_leaves, max_tree_depth), or both with the same "
            f"number of trees in front; got {tuple(rewards.shape)} and {tuple(ancestor_ids.shape)}."
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` is {estimator!r}. Choose one of {', '.join(ESTIMATORS)}.")
    for name, given in (("leaf_weights", leaf_weights), ("leaf_scores", leaf_scores)):
        if given is not None and given.shape != rewards.shape:
            raise ValueError(f"`{name}` must be {tuple(rewards.shape)} like the rewards; got {tuple(given.shape)}.")
    weights = torch.ones_like(rewards) if leaf_weights is None else leaf_weights.to(rewards)
    num_leaves, depth = ancestor_ids.shape[-2:]
    ids = ancestor_ids.reshape(-1, num_leaves, depth)
    shape = ids.shape[:2]
    scores = None if leaf_scores is None else leaf_scores.to(rewards).reshape(shape)
    groups = _groups(rewards.reshape(shape), weights.reshape(shape), scores, ids, subgroup_rejection)
    advantages = ESTIMATORS[estimator](groups)
    is_defined = (ids >= 0) & ~torch.isnan(rewards).reshape(*ids.shape[:2], 1) & (groups.sizes[:, :, :1] > 0)
    return torch.where(is_defined, advantages, 0.0).view_as(ancestor_ids)


def _groups(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    scores: torch.Tensor | None,
    ancestor_ids: torch.Tensor,
    subgroup_rejection: bool,
) -> _Groups:
    num_trees, num_leaves, depth = ancestor_ids.shape
    if ancestor_ids.numel() and int(ancestor_ids.max()) >= 2 * num_leaves * depth:  # too large to index a table
        ancestor_ids = torch.unique(ancestor_ids, return_inverse=True)[1].where(ancestor_ids >= 0, -1)
    num_nodes = int(ancestor_ids.max()) + 1 if ancestor_ids.numel() else 0
    is_scorable = ~torch.isnan(rewards)
    rewards = torch.where(is_scorable, rewards, 0.0)
    weights = weights * is_scorable
    # Slot 0 is the query group and the last one takes what is past the leaves.
    query = ancestor_ids.new_zeros(num_trees, num_leaves, 1)
    slots = torch.cat([query, torch.where(ancestor_ids >= 0, ancestor_ids + 1, num_nodes + 1)], dim=2)
    flat = slots.flatten(1)
    is_past = slots > num_nodes

    def per_group(values: torch.Tensor, reduce: str = "sum", start: float = 0.0) -> torch.Tensor:
        """Values `(T, W)` of the leaves reduced over each group, `(T, W, 1 + D)`; 0 past the leaf."""
        table = values.new_full((num_trees, num_nodes + 2), start)
        table.scatter_reduce_(1, flat, values[:, :, None].expand_as(slots).flatten(1), reduce)
        return table.gather(1, flat).view_as(slots).masked_fill(is_past, 0)

    counts = per_group(is_scorable.to(rewards.dtype))
    is_used = counts > 1
    if subgroup_rejection:
        highest = per_group(rewards.masked_fill(~is_scorable, -torch.inf), "amax", -torch.inf)
        lowest = per_group(rewards.masked_fill(~is_scorable, torch.inf), "amin", torch.inf)
        is_used &= highest > lowest
    is_used[:, :, 0] = True
    totals = per_group(weights), per_group(weights * rewards)
    scored = totals if scores is None else (per_group(weights * scores), per_group(weights * scores * rewards))
    return _Groups(rewards, counts, *totals, *scored, is_used)


def _grpo(groups: _Groups) -> torch.Tensor:
    """`R_i - mean(R over the query group)` in every segment, as GRPO does."""
    return groups.terms[:, :, :1].expand_as(groups.terms[:, :, 1:])


def _treepo(groups: _Groups) -> torch.Tensor:
    """Numerator of Eq. 5: mean of `a_ij` over the groups `j`, the same in every segment."""
    return _weighted_mean(groups.terms, groups.is_used.to(groups.terms.dtype))


def _treepo_size_weighted(groups: _Groups) -> torch.Tensor:
    """Numerator of Eq. 6: `sum_j |G_j| a_ij / sum_j |G_j|`, the same in every segment; `|G_j|` sums leaf weights."""
    return _weighted_mean(groups.terms, groups.is_used * groups.sizes)


def _weighted_mean(terms: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(terms.dtype).tiny
    means = (terms * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=tiny)
    return means.expand_as(terms[:, :, 1:])


def _treepo_segment(groups: _Groups) -> torch.Tensor:
    """Mean of `a_ij` over the query group and the groups of the ancestors above the segment (this package)."""
    totals = (groups.terms * groups.is_used).cumsum(-1)[:, :, :-1]
    return totals / groups.is_used.cumsum(-1)[:, :, :-1]


def _value_difference(groups: _Groups) -> torch.Tensor:
    """`V(node) - V(parent)`, the parent of a first segment being the query; as in SPO (arXiv 2505.23564)."""
    return groups.means.diff(dim=-1)


def _treerl(groups: _Groups) -> torch.Tensor:
    """
    `(V(node) - V(query) + V(node) - V(parent)) / sqrt(leaves below the node)`, as in TreeRL (arXiv 2506.11902).

    The root makes up for a segment's part in the update, which grows with the leaves that share it.
    """
    values = groups.means
    numerators = 2 * values[:, :, 1:] - values[:, :, :1] - values[:, :, :-1]
    return numerators / groups.counts[:, :, 1:].clamp(min=1).sqrt()


def _leave_one_out(groups: _Groups) -> torch.Tensor:
    """
    `V(node) - sum_j S_j / sum_j N_j` over the groups above the segment; `S_j` and `N_j` sum the weighted rewards and
    the weights of the group's leaves that are not below the node.

    A leaf counts once for each ancestor that it shares with the segment, so near relatives count most. RLOO
    (arXiv 2402.14740) is the case of a tree of depth one. 0 where the whole tree is below the node.
    """
    depth = groups.counts.size(-1) - 1
    num_above = torch.arange(1, depth + 1, device=groups.counts.device)

    def of_others(totals: torch.Tensor) -> torch.Tensor:
        return totals.cumsum(-1)[:, :, :-1] - num_above * totals[:, :, 1:]

    has_others = groups.counts[:, :, :1] > groups.counts[:, :, 1:]
    baselines = of_others(groups.sums) / torch.where(has_others, of_others(groups.sizes), 1.0)
    return torch.where(has_others, groups.means[:, :, 1:] - baselines, 0.0)


def _optimal_baseline(groups: _Groups) -> torch.Tensor:
    """
    `V(node)` minus the score-weighted mean reward of the leaves that are not below it.

    The constant of least noise is `E[|s|^2 R] / E[|s|^2]` for scores `s` (Greensmith, Bartlett and Baxter 2004). 0
    where the whole tree is below the node. It is a ratio, and how many leaves the others have may depend on whether
    the segment ended: a bias of the order of 1 / W, under 1 % of the gradient on the chain of the tests. Without
    branching there is none.
    """
    has_others = groups.counts[:, :, :1] > groups.counts[:, :, 1:]
    sizes, sums = groups.scored_sizes, groups.scored_sums
    rest = (sizes[:, :, :1] - sizes[:, :, 1:]).clamp(min=torch.finfo(sizes.dtype).tiny)
    others = (sums[:, :, :1] - sums[:, :, 1:]) / rest
    return torch.where(has_others, groups.means[:, :, 1:] - others, 0.0)


ESTIMATORS: dict[str, Callable[[_Groups], torch.Tensor]] = {
    "treepo": _treepo,
    "treepo_size_weighted": _treepo_size_weighted,
    "treepo_segment": _treepo_segment,
    "value_difference": _value_difference,
    "treerl": _treerl,
    "leave_one_out": _leave_one_out,
    "optimal_baseline": _optimal_baseline,
    "grpo": _grpo,
}
"""The choices of `advantage_estimator`: `(T, W, D)` advantages of each tree's leaves and their segments."""


def leaf_paths(trees: list[SegmentTree], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Node ids and lengths in tokens of the segments on each leaf's path, leaves in the trees' order.

    An answer is no decision: its tokens count with the segment that called for it.

    Two int64 tensors `(num_trees, width, max_tree_depth)`: -1 and 0 past the leaf, and for what a tree lacks of
    `width` leaves. By default that is the most that one of the trees has.
    """
    width = width or max(len(tree.leaves) for tree in trees)
    answers = [answers_of(tree) for tree in trees]
    paths: list[list[int]] = []
    for tree, own in zip(trees, answers, strict=True):
        paths += [[node for node in tree.path(leaf) if node not in own] for leaf in tree.leaves]
        paths += [[] for _ in range(width - len(tree.leaves))]
    depth = max(map(len, paths))
    ids = torch.tensor([path + [-1] * (depth - len(path)) for path in paths]).view(len(trees), width, depth)
    sizes: list[list[int]] = []
    for tree, own in zip(trees, answers, strict=True):
        sizes.append([len(node.token_ids) for node in tree.nodes])
        for answer, segment in own.items():
            sizes[-1][segment] += len(tree.nodes[answer].token_ids)
    return ids, values_at(ids, sizes)


def values_at(ids: torch.Tensor, of_nodes: list[list[int]]) -> torch.Tensor:
    """Value of each node of `ids` `(T, W, D)`, int64, from a list of values per tree; 0 where the id is -1."""
    values = torch.zeros_like(ids)
    for tree_ids, own, out in zip(ids, of_nodes, values, strict=True):
        torch.take(torch.tensor([*own, 0]), tree_ids, out=out)  # the last is what -1 finds
    return values


def answers_of(tree: SegmentTree) -> dict[int, int]:
    """
    Each answer of a tree, and the segment that it belongs to.

    An answer to nothing is left out, and so are different answers to one segment: they count as segments.
    """
    found: dict[int, int] = {}
    for node, each in enumerate(tree.nodes):
        if not each.is_sampled and each.parent is not None and len(tree.nodes[each.parent].children) == 1:
            found[node] = found.get(each.parent, each.parent)
    return found


def leaf_scores(trees: list[SegmentTree], width: int | None = None) -> torch.Tensor:
    """
    `(num_trees, width)`: sum of 1 - p over the sampled tokens of each leaf; 0 for what a tree lacks of `width` leaves.

    Its expectation is that of the squared norm of the score in the space of the logits, `sum (1 - p_t)`. Segments that
    were stored without log-probabilities count their tokens.
    """
    width = width or max(len(tree.leaves) for tree in trees)
    scores: list[list[float]] = []
    for tree in trees:
        totals: list[float] = []
        for node in tree.nodes:  # parents come before children
            own = float(len(node.token_ids)) if node.is_sampled else 0.0
            if node.logprobs is not None:
                own -= float(torch.tensor(node.logprobs, dtype=torch.float64).exp().sum())
            totals.append(own + (0.0 if node.parent is None else totals[node.parent]))
        scores.append([max(totals[leaf], 1e-6) for leaf in tree.leaves] + [0.0] * (width - len(tree.leaves)))
    return torch.tensor(scores)


def expand_to_tokens(advantages: torch.Tensor, lengths: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Per-segment values `(num_trees, num_leaves, max_tree_depth)` as per-token values `(num_trees * num_leaves,
    num_tokens)`, each repeated over its segment's length; 0 past the leaf.
    """
    totals = lengths.sum(-1).flatten()
    expanded = advantages.new_zeros(len(totals), num_tokens)
    is_token = torch.arange(num_tokens, device=advantages.device) < totals[:, None]
    expanded[is_token] = advantages.flatten().repeat_interleave(lengths.flatten())
    return expanded
