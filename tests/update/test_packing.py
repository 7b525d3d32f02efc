"""A packed row spells the plain rows, by hypothesis; and how rows are cut into pieces."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.rows import Batch, batch_of, packed_sizes
from treepo_trl.update.packing import PackedRows, cut_rows, pack_rows


def check_structure(ids: torch.Tensor, mask: torch.Tensor, num_scored: int) -> PackedRows:
    """Every promise of `PackedRows`, with loops."""
    packed = pack_rows(ids, mask, num_scored)
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    num_packed = packed.input_ids.size(1)
    tokens, depths, labels = packed.input_ids[0], packed.position_ids[0], packed.shift_labels[0]
    for tensor in (packed.input_ids, packed.position_ids, packed.shift_labels, packed.last_descendants, packed.index):
        assert tensor.dtype == torch.int64
    assert packed.input_ids.shape == packed.position_ids.shape == packed.shift_labels.shape == (1, num_packed)
    assert packed.index.shape == packed.is_scored.shape == (len(ids), num_scored)
    attends = packed.attention_mask()
    assert attends.shape == (1, 1, num_packed, num_packed)
    assert attends.dtype == torch.bool

    # What a position stands for: a prefix together with its next token, `None` at the end of the row. Its ancestors,
    # itself included and in order, spell the prefix; its position is how many come before it.
    counts = Counter((tuple(row[: i + 1]), (*row, None)[i + 1]) for row in rows for i in range(len(row)))
    spelled = [tuple(tokens[attends[0, 0, p]].tolist()) for p in range(num_packed)]
    assert all(attends[0, 0].diagonal())
    if counts:
        assert [len(prefix) - 1 for prefix in spelled] == depths.tolist()
        # Each of them exactly once, with the number of its rows: nothing is missing, nothing is there twice.
        assert sorted(packed.num_rows[0].tolist()) == sorted(counts.values())
        assert sorted(spelled) == sorted(prefix for prefix, _ in counts)
        of_prefix, summed = Counter(), Counter()
        for (prefix, _), count in counts.items():
            of_prefix[prefix] += count
        for prefix, count in zip(spelled, packed.num_rows[0].tolist(), strict=True):
            summed[prefix] += count
        assert summed == of_prefix
    assert packed.num_row_tokens == sum(map(len, rows))
    assert packed.num_padded_tokens == ids.numel()
    assert packed.ratio == packed.num_row_tokens / num_packed

    first_scored = ids.size(1) - num_scored
    scored_positions = set()
    for i in range(len(ids)):
        for t in range(num_scored):
            column = first_scored + t
            prefix = ids[i, :column][mask[i, :column].bool()].tolist()
            assert packed.is_scored[i, t].item() == bool(mask[i, column] and prefix)
            if packed.is_scored[i, t]:
                p = int(packed.index[i, t])
                scored_positions.add(p)
                assert spelled[p] == tuple(prefix)
                assert labels[p] == ids[i, column]
            else:
                assert packed.index[i, t] == 0
    assert [p for p in range(num_packed) if labels[p] != -100] == sorted(scored_positions)
    return packed


# Structure


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows over few tokens, so that prefixes are shared in every way, of prompts and completions of any length."""
    vocabulary = draw(st.integers(1, 3))
    token = st.integers(2, 1 + vocabulary)
    trunks = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=3))
    prompts, completions = [], []
    for _ in range(draw(st.integers(1, 7))):
        prompts.append(draw(st.sampled_from(trunks)))
        completions.append(draw(st.sampled_from(trunks)) + draw(st.lists(token, max_size=4)))
    return batch_of(prompts, completions)


@given(batches())
def test_packed_positions_spell_the_rows(batch: Batch) -> None:
    check_structure(*batch)


@given(batches(), st.data())
def test_any_mask_and_any_number_of_scored_columns(batch: Batch, data: st.DataObject) -> None:
    """Holes, completely masked rows and completions, rows without a prompt."""
    ids, mask, _ = batch
    bits = data.draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=mask.numel(), max_size=mask.numel()))
    check_structure(ids, mask * torch.tensor(bits).view_as(mask), data.draw(st.integers(1, ids.size(1))))


def test_a_small_tree_by_hand() -> None:
    # Rows 5 7 8 and 5 7 9 with prompt 5: nodes (5|7), (7|8), 8, (7|9), 9 in depth-first order. The 7 is there twice:
    # it has two next tokens.
    packed = pack_rows(*batch_of([[5], [5]], [[7, 9], [7, 8]]))
    assert packed.input_ids.tolist() == [[5, 7, 8, 7, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1, 2]]
    assert packed.shift_labels.tolist() == [[7, 8, -100, 9, -100]]
    assert packed.last_descendants.tolist() == [4, 2, 2, 4, 4]
    assert packed.index.tolist() == [[0, 3], [0, 1]]
    assert packed.is_scored.all()
    assert packed.num_row_tokens == 6
    assert packed.ratio == 6 / 5


def test_a_batch_without_any_token_is_a_valid_input() -> None:
    ids, mask, num_scored = batch_of([[5, 6]], [[7, 8]])
    packed = check_structure(ids, mask * 0, num_scored)
    assert packed.input_ids.shape == (1, 1)
    assert packed.shift_labels.tolist() == [[-100]]
    assert packed.attention_mask().all()
    assert packed.unpack(torch.tensor([[3.0]])).tolist() == [[0.0, 0.0]]


def test_boolean_masks_and_any_padding_token_serve_and_inputs_are_not_changed() -> None:
    ids, mask, num_scored = batch_of([[5], [5, 6]], [[7], [7, 8]])
    before = ids.clone(), mask.clone()
    changed = torch.where(mask.bool(), ids, torch.randint(0, 99, ids.shape))
    one, other = pack_rows(ids, mask, num_scored), pack_rows(changed, mask.bool(), num_scored)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.index, other.index)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


def test_tokens_beyond_one_byte() -> None:
    # 44 is the last byte of 300: rows in the order of their last bytes would part the two that share 300.
    check_structure(*batch_of([[70_000]] * 3, [[300, 5], [44, 5], [300, 6]]))


def test_unpack_puts_values_where_they_are_scored_and_adds_up_gradients() -> None:
    packed = pack_rows(*batch_of([[5], [5], [5]], [[7, 9], [7, 8], [7]]))
    # Sorted rows: 5 7, then 5 7 8, then 5 7 9. Positions: 0 (5|7), 1 (7|end), 2 (7|8), 3 8, 4 (7|9), 5 9.
    assert packed.input_ids.tolist() == [[5, 7, 7, 8, 7, 9]]
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], requires_grad=True)
    rows = packed.unpack(values)
    assert rows.tolist() == [[1.0, 5.0], [1.0, 3.0], [1.0, 0.0]]
    # Weights 1, 2, 4 for the rows: position 0 serves all three, 4 the first, 2 the second.
    (rows * torch.tensor([[1.0], [2.0], [4.0]])).sum().backward()
    assert values.grad.tolist() == [[7.0, 0.0, 2.0, 0.0, 1.0, 0.0]]


def test_unpack_hides_what_is_not_a_number_at_unscored_places() -> None:
    packed = pack_rows(*batch_of([[5], [5]], [[7, 8], [7]]))
    values = torch.full((1, packed.input_ids.size(1)), 2.0)
    values[0, 0] = torch.nan  # unscored entries of `index` point here, and so does each row's first scored token
    assert packed.unpack(values)[1, 1] == 0


# Pieces


@given(batches(), st.integers(1, 30))
def test_pieces_hold_every_row_once_and_as_many_tokens_as_allowed(batch: Batch, max_tokens: int) -> None:
    pieces = cut_rows(*batch, max_tokens)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(len(batch[0])))
    for piece, size in zip(pieces, packed_sizes(pieces, batch), strict=True):
        assert size <= max_tokens or piece.stop - piece.start == 1


# Two trees of two leaves. First: prompt 5, completions 7 8 and 7 9, which pack to (5|7) (7|8) 8 (7|9) 9: 5 tokens.
# Second: prompt 6 and the same completions, 5 tokens.
TWO_TREES = ([[5], [5], [6], [6]], [[7, 8], [7, 9], [7, 8], [7, 9]])


@pytest.mark.parametrize(
    ("max_tokens", "pieces"),
    [
        (10, [(0, 4)]),
        (9, [(0, 2), (2, 4)]),  # no row of the second tree, though its first (3 tokens) would fit
        (5, [(0, 2), (2, 4)]),
        (4, [(0, 1), (1, 2), (2, 3), (3, 4)]),  # a tree that fits no piece: rows of 3 tokens
        (1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_whole_trees_where_they_fit(max_tokens: int, pieces: list[tuple[int, int]]) -> None:
    cut = cut_rows(*batch_of(*TWO_TREES), max_tokens)
    assert [(piece.start, piece.stop) for piece in cut] == pieces


def test_a_tree_may_join_what_is_left_of_a_larger_one() -> None:
    # A tree of 3 leaves, 5 | 7 8, 7 9, 8 8: (5|7) (7|8) 8 (7|9) 9 (5|8) (8|8) 8 = 8 tokens, more than 6. Its last row
    # has 3 of its own, and the next tree, one row of 3, joins it.
    batch = batch_of([[5], [5], [5], [6]], [[7, 8], [7, 9], [8, 8], [7, 8]])
    assert [(piece.start, piece.stop) for piece in cut_rows(*batch, 6)] == [(0, 2), (2, 4)]
    # The first two rows are 5 tokens and fill a piece of 5; two rows of 3 do not fit into one.
    assert [(piece.start, piece.stop) for piece in cut_rows(*batch, 5)] == [(0, 2), (2, 3), (3, 4)]


def test_a_tree_that_opens_a_piece_shares_nothing_with_the_one_before() -> None:
    # Rows 5 5 6 8, and 5 5 7 8 and 5 5 7 9 of another prompt. In one row (5|5) would be there once; a piece of the
    # second tree alone has 4 + 2 tokens, one more than 5.
    batch = batch_of([[5, 5, 6], [5, 5, 7], [5, 5, 7]], [[8], [8], [9]])
    assert [(piece.start, piece.stop) for piece in cut_rows(*batch, 5)] == [(0, 1), (1, 2), (2, 3)]
    assert [(piece.start, piece.stop) for piece in cut_rows(*batch, 6)] == [(0, 1), (1, 3)]


def test_one_piece_holds_all_rows_that_fit() -> None:
    ids, mask, num_scored = batch_of([[5, 6]] * 4, [[7, 8]] * 4)
    assert cut_rows(ids, mask * 0, num_scored, 1) == [slice(0, 4)]
    assert cut_rows(ids, mask, num_scored, 4) == [slice(0, 4)]
