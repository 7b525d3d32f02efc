"""Paths of trees as tensors, and values of segments over their tokens."""

import torch

from treepo_trl.sampling.tree import SegmentTree
from treepo_trl.update.advantages import expand_to_tokens, leaf_paths


# From trees and to tokens


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
