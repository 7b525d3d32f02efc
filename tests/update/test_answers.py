"""Advantages of trees with answers: an answer is no decision, and belongs to the segment that called for it."""

import pytest
import torch

from treepo_trl import SegmentTree
from treepo_trl.sampling.resolved_variance import DepthStatistics
from treepo_trl.update.advantages import ESTIMATORS, expand_to_tokens, leaf_paths, leaf_scores, tree_advantages
from treepo_trl.update.row_advantages import weighted_advantages


def tree_with_answers(with_answers: bool = True) -> SegmentTree:
    """
    Two segments below the prompt. The first calls and its answer has two tokens; two leaves are behind it. The second
    one calls too, and the one leaf behind its answer is cut in two.
    """
    tree = SegmentTree([1, 2])
    first, second = tree.add(None, [3, 4], [-0.1, -0.2]), tree.add(None, [5], [-0.3])
    if with_answers:
        first, second = tree.add(first, [90, 91], is_sampled=False), tree.add(second, [92], is_sampled=False)
    tree.add(first, [6], [-0.4], "stop")
    tree.add(first, [7, 8], [-0.5, -0.6], "stop")
    middle = tree.add(second, [9], [-0.7])
    tree.add(middle, [10], [-0.8], "stop")
    tree.sort_leaves()
    return tree


REWARDS = torch.tensor([[1.0, 0.0, 0.5]])


def sampled_values(tree: SegmentTree, advantages: torch.Tensor, lengths: torch.Tensor) -> list[list[float]]:
    """The value of each sampled token of each leaf."""
    tokens = expand_to_tokens(advantages, lengths, 12).tolist()
    return [
        [value for value, flag in zip(row, tree.sampled_mask(leaf), strict=False) if flag]
        for row, leaf in zip(tokens, tree.leaves, strict=True)
    ]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_segments_have_the_advantages_that_they_have_without_answers(estimator: str) -> None:
    values = []
    for with_answers in (True, False):
        tree = tree_with_answers(with_answers)
        ids, lengths = leaf_paths([tree])
        scores = leaf_scores([tree])
        advantages = tree_advantages(REWARDS, ids, estimator, leaf_scores=scores)
        values.append((sampled_values(tree, advantages, lengths), scores.tolist()))
    assert values[0] == values[1]


@pytest.mark.parametrize("estimator", ["treepo", "leave_one_out", "optimal_baseline"])
def test_weights_are_those_without_answers(estimator: str) -> None:
    """Of leaves, of segments with fallbacks behind them, and in what the depths decide."""
    values = []
    for with_answers in (True, False):
        tree = tree_with_answers(with_answers)
        stem = tree.nodes[tree.leaves[0]].parent
        fallback = tree.add(stem, [11], [-0.9], wave=1)
        if with_answers:
            fallback = tree.add(fallback, [93, 94, 95], wave=1, is_sampled=False)
        tree.add(fallback, [12], [-1.0], "stop", wave=1)
        tree.sort_leaves()
        ids, lengths = leaf_paths([tree])
        rewards = torch.tensor([[1.0, 0.0, 0.25, 0.5]])
        rows = sampled_values(tree, weighted_advantages([tree], ids, rewards, estimator), lengths)
        depths = DepthStatistics.of_depth(4)
        depths.add(tree, rewards[0].tolist())
        values.append((rows, tree.leaf_weights(), tree.mean_length(), depths))
    assert values[0] == values[1]
    assert any(any(row) for row in values[0][0])


def test_value_difference_by_hand() -> None:
    """
    Values: prompt (1 + 0 + 0.5) / 3 = 0.5; first segment 0.5, its leaves 1 and 0; second segment 0.5, and so on.

    Tokens of an answer have the advantage of their segment.
    """
    tree = tree_with_answers()
    ids, lengths = leaf_paths([tree])
    advantages = tree_advantages(REWARDS, ids, "value_difference")
    tokens = expand_to_tokens(advantages, lengths, 6)
    expected = [[0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0, -0.5, -0.5], [0.0] * 6]
    assert lengths[0].tolist() == [[4, 1, 0], [4, 2, 0], [2, 1, 1]]
    torch.testing.assert_close(tokens, torch.tensor(expected))


def test_different_answers_to_one_call_are_a_group() -> None:
    """A search of one's own may ask twice; then the answers decide something."""
    rows = [[3, 90, 6], [3, 91, 7]]
    tree = SegmentTree.from_rows([1], rows, masks=[[1, 0, 1], [1, 0, 1]])
    ids, lengths = leaf_paths([tree])
    assert lengths.sum(-1).tolist() == [[3, 3]]
    advantages = expand_to_tokens(tree_advantages(torch.tensor([[1.0, 0.0]]), ids, "value_difference"), lengths, 3)
    assert advantages.tolist() == [[0.0, 0.5, 0.0], [0.0, -0.5, 0.0]]
