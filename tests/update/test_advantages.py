"""Tree advantages: the paper's figure 3 by hand, the laws that hold on every tree, and paths of trees as tensors."""

import math
import random
from collections.abc import Callable
from itertools import count
from typing import get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import pad

from treepo_trl.sampling.tree import SegmentTree
from treepo_trl.update.advantages import ESTIMATORS, AdvantageEstimator, expand_to_tokens, leaf_paths, tree_advantages


LeafSet = tuple[torch.Tensor, torch.Tensor]
"""Rewards `(W,)` float64 and ancestors `(W, D)`."""
nan = math.nan

# Figure 3 of the paper. Nodes: a 0, b 1, c 2, c1 3, c2 4, and the leaves of c1, c2 and c.
#
#   a = -1
#   b = +1
#   c ─ c1 ─ c11 = -1, c12 = -1
#     ─ c2 ─ c21 = +1, c22 = +1, c23 = -1
#     ─ c3 = -1
# Leaves: a, b, c11, c12, c21, c22, c23, c3.
REWARDS = torch.tensor([-1.0, 1, -1, -1, 1, 1, -1, -1])
ANCESTORS = torch.tensor(
    [[0, -1, -1], [1, -1, -1], [2, 3, 5], [2, 3, 6], [2, 4, 7], [2, 4, 8], [2, 4, 9], [2, 10, -1]]
)


def per_leaf(advantages: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """The value of each leaf, after checking that it is the same in all of its segments and 0 past them."""
    assert advantages.shape == ancestors.shape
    values = advantages[:, 0]
    assert torch.equal(advantages, values[:, None] * (ancestors >= 0))
    return values


def advantages_of(rewards: torch.Tensor, ancestors: torch.Tensor, estimator: str, **options: object) -> torch.Tensor:
    return per_leaf(tree_advantages(rewards, ancestors, estimator, **options), ancestors)


# Figure 3
#
# Means: query group -2/8 = -1/4; c {-1, -1, +1, +1, -1, -1} = -1/3; c1 {-1, -1} = -1; c2 {+1, +1, -1} = 1/3.
# (The figure prints 1.125 for c22 in c; 1 + 1/3 = 1.333 is right.)
#   a, b     query: -1 + 1/4 = -3/4 and 1 + 1/4 = 5/4
#   c11, c12 query -3/4, c: -1 + 1/3 = -2/3, c1: 0
#   c21, c22 query 5/4, c: 1 + 1/3 = 4/3, c2: 1 - 1/3 = 2/3
#   c23      query -3/4, c -2/3, c2: -1 - 1/3 = -4/3
#   c3       query -3/4, c -2/3 (its own node is a group of one and adds nothing)


@pytest.mark.parametrize(
    ("estimator", "subgroup_rejection", "expected"),
    [
        ("grpo", False, [-3 / 4, 5 / 4, -3 / 4, -3 / 4, 5 / 4, 5 / 4, -3 / 4, -3 / 4]),
        # means of the terms: (-3/4 - 2/3 + 0)/3 = -17/36, (5/4 + 4/3 + 2/3)/3 = 13/12, (-3/4 - 2/3 - 4/3)/3 = -11/12,
        # (-3/4 - 2/3)/2 = -17/24; the released code gives the same: -.4722, 1.0833, -.9167, -.7083
        ("treepo", False, [-3 / 4, 5 / 4, -17 / 36, -17 / 36, 13 / 12, 13 / 12, -11 / 12, -17 / 24]),
        # weights 8, 6, 2 or 3: (-6 - 4 + 0)/16 = -5/8, (10 + 8 + 2)/17 = 20/17, (-6 - 4 - 4)/17 = -14/17,
        # (-6 - 4)/14 = -5/7; the released code: -.625, 1.1765, -.8235, -.7143
        ("treepo_size_weighted", False, [-3 / 4, 5 / 4, -5 / 8, -5 / 8, 20 / 17, 20 / 17, -14 / 17, -5 / 7]),
        # c1 has equal rewards and drops out: c11, c12 = (-6 - 4)/14 = -5/7; the released code: -.7143
        ("treepo_size_weighted", True, [-3 / 4, 5 / 4, -5 / 7, -5 / 7, 20 / 17, 20 / 17, -14 / 17, -5 / 7]),
        # and with equal weights (-3/4 - 2/3)/2 = -17/24
        ("treepo", True, [-3 / 4, 5 / 4, -17 / 24, -17 / 24, 13 / 12, 13 / 12, -11 / 12, -17 / 24]),
    ],
)
def test_figure_3_of_the_paper(estimator: str, subgroup_rejection: bool, expected: list[float]) -> None:
    values = advantages_of(REWARDS, ANCESTORS, estimator, subgroup_rejection=subgroup_rejection)
    torch.testing.assert_close(values, torch.tensor(expected))


# By segment. Depth 0 holds a, b and c; depth 1 c1, c2 and c3; depth 2 the leaves of c1 and c2.
#
# treepo_segment: means of the terms above, of the query group alone at depth 0; with c at depth 1: c11, c12, c23, c3
#   (-3/4 - 2/3)/2 = -17/24, c21, c22 (5/4 + 4/3)/2 = 31/24; with c1 or c2 at depth 2: as "treepo".
# value_difference: a -1 + 1/4, b 1 + 1/4, c -1/3 + 1/4 = -1/12; c1 -1 + 1/3 = -2/3, c2 1/3 + 1/3 = 2/3, c3 -2/3;
#   c11, c12 -1 + 1 = 0, c21, c22 1 - 1/3 = 2/3, c23 -1 - 1/3 = -4/3.
# treerl: with V(query) -1/4, twice V(node) minus V(query) minus V(parent), over the root of the leaves below:
#   a -3/2, b 5/2, c (-2/3 + 1/4 + 1/4)/sqrt(6) = -1/6/sqrt(6); c1 (-2 + 1/4 + 1/3)/sqrt(2) = -17/12/sqrt(2),
#   c2 (2/3 + 1/4 + 1/3)/sqrt(3) = 5/4/sqrt(3), c3 -17/12; c11, c12 -2 + 1/4 + 1 = -3/4,
#   c21, c22 2 + 1/4 - 1/3 = 23/12, c23 -2 + 1/4 - 1/3 = -25/12.
# leave_one_out: rewards sum to -2 over 8 leaves, to -2 over 6 below c, to -2 over 2 below c1, to 1 over 3 below c2.
#   a: -1 - (-1)/7 = -6/7; b: 1 - (-3)/7 = 10/7; c: -1/3 - 0/2 = -1/3
#   c1: -1 - (0 + 0)/(6 + 4) = -1; c2: 1/3 - (-3 - 3)/(5 + 3) = 13/12; c3: -1 - (-1 - 1)/(7 + 5) = -5/6
#   c11, c12: -1 - (-1 - 1 - 1)/(7 + 5 + 1) = -10/13; c21, c22: 1 - (-3 - 3 + 0)/(7 + 5 + 2) = 10/7;
#   c23: -1 - (-1 - 1 + 2)/(7 + 5 + 2) = -1


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (
            "treepo_segment",
            [
                *([-3 / 4, 0, 0], [5 / 4, 0, 0]),
                *([-3 / 4, -17 / 24, -17 / 36], [-3 / 4, -17 / 24, -17 / 36]),
                *([5 / 4, 31 / 24, 13 / 12], [5 / 4, 31 / 24, 13 / 12], [-3 / 4, -17 / 24, -11 / 12]),
                [-3 / 4, -17 / 24, 0],
            ],
        ),
        (
            "value_difference",
            [
                *([-3 / 4, 0, 0], [5 / 4, 0, 0]),
                *([-1 / 12, -2 / 3, 0], [-1 / 12, -2 / 3, 0]),
                *([-1 / 12, 2 / 3, 2 / 3], [-1 / 12, 2 / 3, 2 / 3], [-1 / 12, 2 / 3, -4 / 3]),
                [-1 / 12, -2 / 3, 0],
            ],
        ),
        (
            "treerl",
            [
                *([-3 / 2, 0, 0], [5 / 2, 0, 0]),
                *([-1 / 6 / 6**0.5, -17 / 12 / 2**0.5, -3 / 4], [-1 / 6 / 6**0.5, -17 / 12 / 2**0.5, -3 / 4]),
                *([-1 / 6 / 6**0.5, 5 / 4 / 3**0.5, 23 / 12], [-1 / 6 / 6**0.5, 5 / 4 / 3**0.5, 23 / 12]),
                *([-1 / 6 / 6**0.5, 5 / 4 / 3**0.5, -25 / 12], [-1 / 6 / 6**0.5, -17 / 12, 0]),
            ],
        ),
        (
            "leave_one_out",
            [
                *([-6 / 7, 0, 0], [10 / 7, 0, 0]),
                *([-1 / 3, -1, -10 / 13], [-1 / 3, -1, -10 / 13]),
                *([-1 / 3, 13 / 12, 10 / 7], [-1 / 3, 13 / 12, 10 / 7], [-1 / 3, 13 / 12, -1]),
                [-1 / 3, -5 / 6, 0],
            ],
        ),
    ],
)
def test_figure_3_by_segment(estimator: str, expected: list[list[float]]) -> None:
    torch.testing.assert_close(tree_advantages(REWARDS, ANCESTORS, estimator), torch.tensor(expected))


def test_the_optimal_baseline_weights_the_others_by_their_scores() -> None:
    rewards, scores = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    found = tree_advantages(rewards, torch.tensor([[0], [1], [2]]), "optimal_baseline", leaf_scores=scores)
    # Mean rewards of the others: 0; (1 + 3 * 0) / (1 + 3); (1 + 2 * 0) / (1 + 2).
    torch.testing.assert_close(found.flatten(), torch.tensor([1, -1 / 4, -1 / 3]))


# Laws


@st.composite
def leaf_sets(draw: st.DrawFn) -> LeafSet:
    """Rewards, unscorable ones among them, and ancestors of a random tree, leaves and node ids in any order."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    num_leaves = draw(st.integers(1, 12))
    rewards = [draw(st.sampled_from([-1.0, -0.5, 0.0, 1.0, 2.0, nan])) for _ in range(num_leaves)]
    paths: list[list[int]] = []
    counter = count()

    def grow(num_leaves: int, path: list[int]) -> None:
        num_parts = num_leaves if len(path) == 4 else min(num_leaves, rng.randint(1, 4))
        parts = [1] * num_parts
        for _ in range(num_leaves - num_parts):
            parts[rng.randrange(num_parts)] += 1
        for part in parts:
            node = [*path, next(counter)]
            if part == 1 and (len(node) == 5 or rng.random() < 0.5):
                paths.append(node)
            else:
                grow(part, node)

    grow(num_leaves, [])
    rng.shuffle(paths)
    width = max(map(len, paths)) + rng.randint(0, 2)
    ids = torch.tensor([[*path, *[-1] * (width - len(path))] for path in paths])
    return torch.tensor(rewards, dtype=torch.float64), ids


def slow_reference(
    rewards: torch.Tensor,
    ancestors: torch.Tensor,
    estimator: str,
    subgroup_rejection: bool,
    weights: torch.Tensor,
    scores: torch.Tensor,
) -> torch.Tensor:
    """The docstring as loops."""
    result = torch.zeros(ancestors.shape, dtype=rewards.dtype)
    scorable = [k for k in range(len(rewards)) if not rewards[k].isnan()]

    def mean(group: list[int]) -> float:
        return sum(weights[k] * rewards[k] for k in group) / sum(weights[k] for k in group)

    for i in scorable:
        length = int((ancestors[i] >= 0).sum())
        # The query group, then one per depth.
        groups = [scorable, *([k for k in scorable if ancestors[k, d] == ancestors[i, d]] for d in range(length))]
        for d in range(length):
            above, own = groups[: d + 1], groups[d + 1]
            if estimator == "value_difference":
                result[i, d] = mean(own) - mean(above[-1])
                continue
            if estimator == "treerl":
                signal = (mean(own) - mean(scorable)) + (mean(own) - mean(above[-1]))
                result[i, d] = signal / math.sqrt(len(own))
                continue
            if estimator == "leave_one_out":
                others = [k for group in above for k in group if k not in own]
                result[i, d] = mean(own) - mean(others) if others else 0.0
                continue
            if estimator == "optimal_baseline":
                others = [k for k in scorable if k not in own]
                norm = sum(weights[k] * scores[k] for k in others)
                baseline = sum(weights[k] * scores[k] * rewards[k] for k in others) / norm if others else mean(own)
                result[i, d] = mean(own) - baseline
                continue
            total, denominator = 0.0, 0.0
            for j, group in enumerate({"grpo": groups[:1], "treepo_segment": above}.get(estimator, groups)):
                is_equal = len({rewards[k].item() for k in group}) == 1
                if j > 0 and (len(group) == 1 or (subgroup_rejection and is_equal)):
                    continue
                weight = sum(weights[k] for k in group) if estimator == "treepo_size_weighted" else 1.0
                total, denominator = total + weight * (rewards[i] - mean(group)), denominator + weight
            result[i, d] = total / denominator
    return result


options = st.fixed_dictionaries({"estimator": st.sampled_from(list(ESTIMATORS)), "subgroup_rejection": st.booleans()})


UNSCORABLE = (torch.tensor([2.0, nan, 2.0, 5.0]).double(), torch.tensor([[0, 2], [0, 3], [0, 4], [1, -1]]))


@given(leaf_sets(), options, st.booleans(), st.integers(0, 99))
@example(UNSCORABLE, {"estimator": "treepo", "subgroup_rejection": True}, False, 0)  # no other reward of its group
def test_agrees_with_a_slow_loop(leaves: LeafSet, options: dict, weighted: bool, seed: int) -> None:
    rewards, ancestors = leaves
    before = rewards.clone()
    weights = torch.rand(len(rewards), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    scores = 0.01 + weights.flip(0) ** 2
    fast = tree_advantages(
        rewards,
        ancestors,
        **options,
        leaf_weights=weights if weighted else None,
        leaf_scores=scores if weighted else None,
    )
    torch.testing.assert_close(rewards, before, equal_nan=True)  # the caller's are not changed
    ones = torch.ones_like(weights)
    given = {"weights": weights, "scores": scores} if weighted else {"weights": ones, "scores": ones}
    slow = slow_reference(rewards, ancestors, **options, **given)
    torch.testing.assert_close(fast, slow)


def renamed(ancestors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Other node ids, some of them too large to index a table."""
    rng = random.Random(str(order.tolist()))
    names = [name + rng.choice([0, 10**12]) for name in range(int(ancestors.max()) + 1)]
    rng.shuffle(names)
    return torch.where(ancestors >= 0, torch.tensor(names)[ancestors.clamp(min=0)], -1)


# A change of rewards, ancestors and a random order of the leaves, and the same change of their advantages.
CHANGES: dict[str, tuple[Callable[..., LeafSet], Callable[..., torch.Tensor]]] = {
    "a constant added to all rewards changes nothing": (lambda r, ids, _: (r - 1000, ids), lambda a, _: a),
    "advantages scale with the rewards": (lambda r, ids, _: (-3 * r, ids), lambda a, _: -3 * a),
    "the order of the leaves does not matter": (lambda r, ids, order: (r[order], ids[order]), lambda a, o: a[o]),
    "names of the nodes do not matter": (lambda r, ids, order: (r, renamed(ids, order)), lambda a, _: a),
    "columns of padding get zeros": (lambda r, ids, _: (r, pad(ids, (0, 3), value=-1)), lambda a, _: pad(a, (0, 3))),
}


@pytest.mark.parametrize("law", CHANGES)
@given(leaf_sets(), options, st.randoms(use_true_random=False))
def test_laws(law: str, leaves: LeafSet, options: dict, rng: random.Random) -> None:
    change, expect = CHANGES[law]
    order = torch.tensor(rng.sample(range(len(leaves[0])), len(leaves[0])))
    result = tree_advantages(*change(*leaves, order), **options)
    torch.testing.assert_close(result, expect(tree_advantages(*leaves, **options), order))


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 3.5]), min_size=1, max_size=12), options)
def test_a_tree_of_depth_one_is_grpo(values: list[float], options: dict) -> None:
    rewards = torch.tensor(values)
    ancestors = torch.arange(len(rewards))[:, None]
    expected = rewards - rewards.mean()
    if options["estimator"] in (
        "leave_one_out",
        "optimal_baseline",
    ):  # RLOO: r - (n m - r)/(n - 1) = (r - m) n/(n - 1)
        expected = expected * len(rewards) / max(len(rewards) - 1, 1)
    if options["estimator"] == "treerl":  # parent and query are one: the difference counts twice
        expected = 2 * expected
    torch.testing.assert_close(advantages_of(rewards, ancestors, **options), expected)


@given(st.lists(leaf_sets(), min_size=1, max_size=4), options, st.booleans())
def test_trees_in_a_batch_do_not_see_each_other(trees: list[LeafSet], options: dict, weighted: bool) -> None:
    num_leaves = min(len(rewards) for rewards, _ in trees)
    depth = max(ancestors.size(1) for _, ancestors in trees)
    rewards = torch.stack([rewards[:num_leaves] for rewards, _ in trees])
    ancestors = torch.stack([pad(ids[:num_leaves], (0, depth - ids.size(1)), value=-1) for _, ids in trees])
    weights = torch.rand(rewards.shape, dtype=torch.float64) + 0.1 if weighted else None
    batch = tree_advantages(rewards, ancestors, **options, leaf_weights=weights)
    assert batch.shape == ancestors.shape
    for i in range(len(trees)):
        own = None if weights is None else weights[i]
        single = tree_advantages(rewards[i], ancestors[i], **options, leaf_weights=own)
        torch.testing.assert_close(batch[i], single)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_tree_without_weight_has_no_advantages(estimator: str) -> None:
    advantages = tree_advantages(REWARDS, ANCESTORS, estimator, leaf_weights=torch.zeros(len(REWARDS)))
    assert torch.equal(advantages, torch.zeros(ANCESTORS.shape))


# Errors


@pytest.mark.parametrize(
    ("rewards", "ancestors"),
    [((3, 1), (3, 2)), ((2, 3), (1, 3, 2)), ((1, 2, 3), (1, 2, 3, 2)), ((3,), (3,)), ((3,), (4, 2))],
)
def test_shapes_that_do_not_fit_are_refused(rewards: tuple[int, ...], ancestors: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`rewards` must be \(num_leaves,\) and `ancestor_ids`"):
        tree_advantages(torch.zeros(rewards), torch.zeros(ancestors, dtype=torch.int64), "treepo")


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,)])
def test_leaf_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`leaf_weights` must be \(3,\) like the rewards"):
        tree_advantages(torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), "treepo", leaf_weights=torch.ones(shape))


def test_the_choices_of_the_setting_are_the_estimators() -> None:
    assert get_args(AdvantageEstimator) == tuple(ESTIMATORS)


def test_unknown_estimator_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"`estimator` is 'gae'\. Choose one of treepo, treepo_size_weighted, .*grpo"):
        tree_advantages(torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64), "gae")


# Paths of trees, and values of segments over their tokens


def hand_tree() -> SegmentTree:
    """0: [1, 2] with children 2: [3] (leaf) and 3: [4, 5, 6] with 5: [8] (leaf); 1: [7] (leaf)."""
    tree = SegmentTree([9])
    tree.add(None, [1, 2], [-1.0, -1.0])
    tree.add(None, [7], [-1.0], "stop")
    tree.add(0, [3], [-1.0], "stop")
    tree.add(0, [4, 5, 6], [-1.0, -1.0, -1.0])
    tree.add(3, [8], [-1.0], "stop")
    tree.sort_leaves()
    return tree


def test_leaf_paths_are_in_the_order_of_the_leaves_and_padded_to_the_deepest() -> None:
    # Leaves of the second tree are the nodes 1, 2 and 4 in order of completion; depth first 2, 4, 1.
    flat = SegmentTree([9])
    for token in (1, 2, 3):
        flat.add(None, [token] * token, [-1.0] * token, "stop")
    ids, lengths = leaf_paths([flat, hand_tree()])
    assert ids.dtype == lengths.dtype == torch.int64
    assert ids.tolist() == [[[0, -1, -1], [1, -1, -1], [2, -1, -1]], [[0, 2, -1], [0, 3, 4], [1, -1, -1]]]
    assert lengths.tolist() == [[[1, 0, 0], [2, 0, 0], [3, 0, 0]], [[2, 1, 0], [2, 3, 1], [1, 0, 0]]]


def test_expand_repeats_each_value_over_its_segments_tokens() -> None:
    # Values past a leaf are ignored.
    values = torch.tensor([[[1, 2, 7], [3, 4, 5], [6, 7, 7]]] * 2, dtype=torch.float64)
    expanded = expand_to_tokens(values, leaf_paths([hand_tree(), hand_tree()])[1], num_tokens=8)
    assert expanded.dtype == torch.float64
    assert expanded.tolist() == 2 * [
        [1, 1, 2, 0, 0, 0, 0, 0],  # 2 + 1 tokens
        [3, 3, 4, 4, 4, 5, 0, 0],  # 2 + 3 + 1
        [6, 0, 0, 0, 0, 0, 0, 0],
    ]
