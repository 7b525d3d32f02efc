"""Trees from rows: equal prefixes are shared, every row stays what it was."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from treepo_trl import SegmentTree


rows = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=7), min_size=1, max_size=6)


@given(rows, st.booleans())
@example([[2, 3], [2, 3], [2, 3, 1]], False)  # equal rows are leaves of their own, and a row may begin another one
def test_every_row_is_a_leaf(completions: list[list[int]], has_masks: bool) -> None:
    # A token's place and value say whether it was sampled: equal prefixes have equal masks.
    masks = [[int((i + token) % 3 > 0) for i, token in enumerate(row)] for row in completions] if has_masks else None
    logprobs = [[-float(token) for token in row] for row in completions]
    tree = SegmentTree.from_rows([9], completions, logprobs, masks)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == completions
    for i, leaf in enumerate(tree.leaves):
        mask = [1] * len(completions[i]) if masks is None else masks[i]
        assert tree.sampled_mask(leaf) == mask
        assert tree.logprobs(leaf) == [value * flag for value, flag in zip(logprobs[i], mask, strict=True)]
    for siblings in (tree.root_children, *(node.children for node in tree.nodes)):
        inner = [tree.nodes[node] for node in siblings if tree.nodes[node].children]
        starts = [(node.token_ids[0], node.is_sampled) for node in inner]
        assert len(set(starts)) == len(starts)
    assert len(tree.leaves) == sum(node.finish_reason is not None for node in tree.nodes)


def test_no_token_is_stored_twice_that_rows_share() -> None:
    tree = SegmentTree.from_rows([1], [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 4], [3]])
    assert [list(node.token_ids) for node in tree.nodes] == [[5, 6], [3], [7], [9], [8], [4]]
    assert tree.num_unique_tokens == 7


@pytest.mark.parametrize(
    ("completions", "values", "message"),
    [
        ([[5], []], {}, "at least one token"),
        ([[5, 6]], {"logprobs": [[-1.0]]}, "Got 1 log-probabilities for 2 tokens"),
        ([[5, 6]], {"masks": [[1]]}, "Got a mask of 1 values for 2 tokens"),
    ],
)
def test_rows_that_do_not_fit(
    completions: list[list[int]], values: dict[str, list[list[float]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentTree.from_rows([1], completions, **values)  # pyright: ignore[reportArgumentType]
