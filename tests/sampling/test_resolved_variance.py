"""Where a task is decided: analysis of variance on trees whose variances are known."""

import random
import statistics

import pytest

from treepo_trl.sampling.resolved_variance import DepthStatistics
from treepo_trl.sampling.tree import SegmentTree


def random_tree(rng: random.Random, deviations: list[float]) -> tuple[SegmentTree, list[float]]:
    """A tree with one to three children everywhere, and rewards that are sums of effects along each path."""
    tree = SegmentTree([0])
    rewards: list[float] = []

    def grow(parent: int | None, depth: int, value: float) -> None:
        is_last = depth == len(deviations) - 1
        for _ in range(rng.choice([1, 2, 2, 3]) if depth else 2):
            reward = value + rng.gauss(0, deviations[depth])
            node = tree.add(parent, [1, 1], finish_reason="stop" if is_last else None)
            if is_last:
                rewards.append(reward)
            else:
                grow(node, depth + 1, reward)

    grow(None, 0, 0.0)
    return tree, rewards


def test_the_estimate_is_unbiased() -> None:
    deviations = [0.5, 0.0, 1.0, 0.3]
    rng = random.Random(0)
    batches: list[list[float | None]] = []
    for _ in range(60):
        seen = DepthStatistics.of_depth(4)
        for _ in range(30):
            seen.add(*random_tree(rng, deviations))
        batches.append(seen.resolved())
    for found, deviation in zip(zip(*batches, strict=True), deviations, strict=True):
        values = [value for value in found if value is not None]
        error = statistics.stdev(values) / len(values) ** 0.5
        assert abs(statistics.mean(values) - deviation**2) < 4 * error


def test_by_hand() -> None:
    tree = SegmentTree([0])
    parents = [tree.add(None, [1, 2]), tree.add(None, [3])]
    for parent in parents:
        for _ in range(2):
            tree.add(parent, [4], finish_reason="stop")
    seen = DepthStatistics.of_depth(3)
    seen.add(tree, [1.0, 0.0, 0.0, 0.0])
    # Second level: half squared differences 1/2 and 0, of weight 1/2 each. First: of the four pairs two differ by 1,
    # which is a quarter, and all of that is what the second level resolves.
    assert seen.resolved() == [0.0, 0.25, None]
    assert (seen.alive, seen.tokens) == ([1.0, 1.0, 0.0], [1.5, 1.0, 0.0])


def test_what_a_fallback_adds_is_left_out() -> None:
    """It is there because of how the others ended."""
    seen, without = DepthStatistics.of_depth(4), DepthStatistics.of_depth(4)
    tree, rewards = random_tree(random.Random(1), [0.5, 1.0, 0.2, 0.3])
    without.add(tree, rewards)
    for stem in (None, 0):
        tree.add(tree.add(stem, [7], wave=1), [8], finish_reason="stop", wave=1)
    seen.add(tree, [*rewards, 5.0, -5.0])
    assert seen == without


def test_leaves_without_a_reward_are_left_out() -> None:
    tree = SegmentTree([0])
    for _ in range(4):
        tree.add(None, [1], finish_reason="stop")
    seen = DepthStatistics.of_depth(1)
    seen.add(tree, [1.0, None, 0.0, None])
    assert seen.resolved() == [0.5]
    nothing = DepthStatistics.of_depth(1)
    nothing.add(tree, [None, None, None, 1.0])
    assert nothing.resolved() == [None]


def test_numbers_go_to_a_flat_list_and_back() -> None:
    seen = DepthStatistics.of_depth(4)
    seen.add(*random_tree(random.Random(0), [1.0] * 4))
    assert DepthStatistics.from_flat(seen.flat(), 4) == seen
    with pytest.raises(ValueError, match="no statistics of 5 depths"):
        DepthStatistics.from_flat(seen.flat(), 5)


def test_paths_that_have_ended_resolve_nothing_deeper(rng: random.Random) -> None:
    """Half of the paths end with their first segment, and the others add a variance of 1 to its 4."""
    seen = DepthStatistics.of_depth(2)
    for _ in range(4000):
        tree, rewards = SegmentTree([0]), list[float]()
        for i in range(2):
            first = rng.gauss(0, 2)
            node = tree.add(None, [1], finish_reason="stop" if i else None)
            rewards += [first] if i else [first + rng.gauss(0, 1) for _ in range(2)]
            if not i:
                for _ in range(2):
                    tree.add(node, [1], finish_reason="stop")
        tree.sort_leaves()
        seen.add(tree, rewards)
    assert seen.resolved() == pytest.approx([4, 1], abs=0.3)
    assert seen.shape() == ([1, 0.5], [1, 0.5])


def test_an_older_batch_counts_less() -> None:
    seen = DepthStatistics(1.0, [2.0], [4.0], [1.0], [0.5])
    assert seen.then(seen).flat() == pytest.approx([1.97 * value for value in seen.flat()])
