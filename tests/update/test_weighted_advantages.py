"""Which rewards the update of a segment reads: laws on random trees, and a tree with fallbacks by hand."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treepo_trl import SegmentTree
from treepo_trl.update.advantages import leaf_paths
from treepo_trl.update.row_advantages import weighted_advantages


EXACT = ["leave_one_out", "optimal_baseline"]


def grown_tree(rng: random.Random, num_late: int) -> SegmentTree:
    """Two to three children a node over three depths; then paths of a fallback below random inner nodes."""
    tree = SegmentTree([9])
    ends: list[int | None] = [None]
    for depth in range(3):
        level = [parent for parent in ends for _ in range(rng.choice([1, 2, 3]) if depth else 2)]
        ends = []
        for parent in level:
            is_last = depth == 2 or rng.random() < 0.3
            node = tree.add(parent, [rng.randint(1, 5)], [-rng.random()], "stop" if is_last else None)
            ends += [] if is_last else [node]
    stems = [None, *(i for i, node in enumerate(tree.nodes) if node.finish_reason is None)]
    for stem in rng.choices(stems, k=num_late):
        tree.add(stem, [rng.randint(1, 5)], [-rng.random()], "stop", wave=1)
    tree.sort_leaves()
    return tree


def values_of(tree: SegmentTree, rewards: list[float], estimator: str) -> torch.Tensor:
    ids, _ = leaf_paths([tree])
    return weighted_advantages([tree], ids, torch.tensor([rewards], dtype=torch.float64), estimator)[0]


@given(st.randoms(use_true_random=False), st.integers(0, 3), st.sampled_from(EXACT))
def test_a_segment_and_its_baseline_read_no_common_reward(rng: random.Random, num_late: int, estimator: str) -> None:
    """Rewards below a segment change its value alone, and by their own weight."""
    tree = grown_tree(rng, num_late)
    rewards = [rng.random() for _ in tree.leaves]
    before = values_of(tree, rewards, estimator)
    row, leaf = rng.choice(list(enumerate(tree.leaves)))
    after = values_of(tree, [r + (i == row) for i, r in enumerate(rewards)], estimator)
    own, wave = tree.path(leaf), tree.nodes[leaf].wave
    weight = 1 / len(tree.leaves) if wave else tree.leaf_weights()[row]
    sums: dict[int, float] = {}
    for i, other in enumerate(tree.leaves):
        for depth, node in enumerate(tree.path(other)):
            sums[node] = sums.get(node, 0.0) + (after - before)[i, depth].item()
    for node in own:
        below = [other for other in tree.leaves if node in tree.path(other)]
        has_others = any(tree.nodes[other].wave <= wave and other not in below for other in tree.leaves)
        expected = weight if tree.nodes[node].wave == wave and has_others else 0.0
        assert sums[node] == pytest.approx(expected)


@given(st.randoms(use_true_random=False), st.sampled_from(EXACT), st.sampled_from([0.0, 0.7, -12.3]))
def test_nothing_is_learned_from_a_group_of_equal_rewards(rng: random.Random, estimator: str, reward: float) -> None:
    """The entropy of a policy that gets nothing right stays what it is."""
    tree = grown_tree(rng, 2)
    assert values_of(tree, [reward] * len(tree.leaves), estimator).abs().max() < 1e-9


def test_earlier_paths_are_judged_without_a_fallback() -> None:
    """Neither advantages nor weights of the first leaves change with what a fallback adds, whatever its rewards."""
    tree, alone = SegmentTree([9]), SegmentTree([9])
    for each in (tree, alone):
        first = each.add(None, [1])
        for token in (1, 2):
            each.add(first, [token], finish_reason="stop")
        each.add(None, [2], finish_reason="stop")
    tree.add(0, [3], finish_reason="stop", wave=1)
    tree.add(None, [3], finish_reason="stop", wave=1)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]])
    values = weighted_advantages([tree], leaf_paths([tree])[0], rewards, "leave_one_out")[0]
    before = weighted_advantages([alone], leaf_paths([alone])[0], rewards[:, :3], "leave_one_out")[0]
    torch.testing.assert_close(values[:3], before)
    # The stem gets nothing; behind it 1 / 5 of 1 - (1 + 0 + 3 others' weights): near relatives count twice.
    assert values[3, 0] == 0
    of_others = (2 * (0.25 * 1 + 0.25 * 0) + 0.5 * 0 + 0.2 * 0) / (2 * 0.5 + 0.5 + 0.2)
    assert values[3, 1].item() == pytest.approx(0.2 * (1 - of_others))
    assert values[4, 0].item() == pytest.approx(0.2 * (0 - (0.25 + 0.2) / (0.25 + 0.25 + 0.5 + 0.2)))
