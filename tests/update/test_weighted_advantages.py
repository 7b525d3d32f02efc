"""Which rewards the update of a segment reads: laws on random trees, and a tree with fallbacks by hand."""

import itertools
import math
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


# The mean over all trees of a policy that ends at once or draws a second token


END, ON, RIGHT, WRONG = range(4)


def of_all_trees(ends: float, right: float, reward_of_end: float, falls_back: bool) -> tuple[torch.Tensor, float]:
    """Mean of the estimate of trees with three leaves that start with two paths; mean number of fallback leaves."""
    p = {END: ends, ON: 1 - ends, RIGHT: right, WRONG: 1 - right}
    rewards = {END: reward_of_end, RIGHT: 1.0, WRONG: 0.0}
    mean, num_late, total = torch.zeros(4, dtype=torch.float64), 0.0, 0.0

    def count(first: tuple[int, ...], seconds: list[tuple[int, int]], late: tuple[int, ...], chance: float) -> None:
        nonlocal mean, num_late, total
        chance *= math.prod(p[token] for token in (*first, *(token for _, token in seconds), *late))
        tree = SegmentTree([9])
        nodes = [tree.add(None, [t], [math.log(p[t])], "stop" if t == END else None) for t in first]
        for path, token in seconds:
            tree.add(nodes[path], [token], [math.log(p[token])], "stop")
        parent = None
        for i, token in enumerate(late):
            reason = "stop" if i == len(late) - 1 else None
            parent = tree.add(parent, [token], [math.log(p[token])], reason, wave=1)
        values = values_of(tree, [rewards[tree.completion_ids(leaf)[-1]] for leaf in tree.leaves], "leave_one_out")
        for row, leaf in zip(values.tolist(), tree.leaves, strict=True):
            for value, node in zip(row, tree.path(leaf), strict=False):
                (token,) = tree.nodes[node].token_ids
                score = torch.tensor([-p[t] * ((t < RIGHT) == (token < RIGHT)) for t in range(4)], dtype=torch.float64)
                score[token] += 1
                mean = mean + chance * value * score
        num_late, total = num_late + chance * bool(late), total + chance

    for first in itertools.product((END, ON), repeat=2):
        live = [path for path, token in enumerate(first) if token == ON]
        splits = {0: [()], 1: [(2,)], 2: [(2, 1), (1, 2)]}[len(live)]  # the third leaf goes to either path
        for split in splits:
            paths = [path for path, number in zip(live, split, strict=True) for _ in range(number)]
            for tokens in itertools.product((RIGHT, WRONG), repeat=len(paths)):
                fallbacks = [(END,), (ON, RIGHT), (ON, WRONG)] if falls_back and not live else [()]
                for late in fallbacks:
                    count(first, list(zip(paths, tokens, strict=True)), late, 1 / len(splits))
    assert total == pytest.approx(1)
    return mean, num_late


@pytest.mark.parametrize("falls_back", [False, True])
@pytest.mark.parametrize(("ends", "right", "reward"), [(0.3, 0.9, 0.5), (0.1, 0.9, 0.85), (0.5, 0.95, 0.9)])
def test_the_mean_over_all_trees_is_the_gradient(ends: float, right: float, reward: float, falls_back: bool) -> None:
    """Each leaf of a fallback to the prompt brings 1 / W of the gradient on top; nothing else changes."""
    mean, num_late = of_all_trees(ends, right, reward, falls_back)
    value = ends * reward + (1 - ends) * right
    first, second = (1 - ends) * (right - value), (1 - ends) * right * (1 - right)
    exact = torch.tensor([ends * (reward - value), first, second, -second], dtype=torch.float64)
    torch.testing.assert_close(mean, exact * (1 + num_late / 3))
    assert (num_late > 0) == falls_back


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
