"""
Rows that share prefixes, folded into one row that holds every shared token once, and back.

The packed row is laid out depth-first: a token attends to itself and to its ancestors only, its position is its depth,
and its label is its next token, so a causal language model gives it exactly the log-probability that it has in each
plain row. Pure torch and numpy; knows neither trainer nor engine.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from treepo_trl.model_support import FULL_REACH, Reach


TreePacking = Literal["auto", "off", "sdpa", "flex"]


@dataclass(frozen=True)
class PackedRows:
    """Rows of a batch as one row of unique tokens. N packed positions, B rows of at most T scored tokens each."""

    input_ids: torch.Tensor
    """`(1, N)` int64: the tokens in depth-first order."""
    position_ids: torch.Tensor
    """`(1, N)` int64: number of ancestors of each token, its position in each of its rows."""
    last_descendants: torch.Tensor
    """`(N,)` int64: last packed position that each token is an ancestor of."""
    shift_labels: torch.Tensor
    """`(1, N)` int64: next token of each position, -100 where nothing is scored."""
    num_rows: torch.Tensor
    """`(1, N)` int64: how many rows each position belongs to."""
    index: torch.Tensor
    """`(B, T)` int64: packed position that predicts each scored token, 0 where there is none."""
    is_scored: torch.Tensor
    """`(B, T)` bool: which entries of `index` mean something."""
    num_row_tokens: int
    """Tokens of the plain rows, padding left out."""
    num_padded_tokens: int
    """Tokens of the plain rows with their padding: what forwarding them costs."""

    @property
    def ratio(self) -> float:
        """Plain row tokens per packed token: how much the rows share."""
        return self.num_row_tokens / self.input_ids.size(1)

    def attention_mask(self, reach: Reach = FULL_REACH) -> torch.Tensor:
        """`(1, 1, N, N)` bool: True where the query (third axis) attends to the key, in layers that see that far."""
        query = torch.arange(self.input_ids.size(1), device=self.input_ids.device)
        key = query[None, :]
        mask = (key <= query[:, None]) & (query[:, None] <= self.last_descendants[None, :])
        if reach != FULL_REACH:
            mask &= reach.sees(self.position_ids[0, :, None], self.position_ids)
        return mask[None, None]

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Per-position values `(1, N)` as `(B, T)`, 0 where nothing is scored. Gradients of shared ones add up."""
        return values[0][self.index].masked_fill(~self.is_scored, 0)


def pack_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_scored: int) -> PackedRows:
    """
    Fold the rows of a batch by their common prefixes, prompt and completion tokens alike.

    A packed position stands for a prefix together with its next token, so rows that part after a token hold that token
    once each and every position has one label. Time and memory are linear in the tokens of the rows; Python runs per
    row, not per token.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`, int64):
            Rows, padded on either side.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            0 on padding. Rows may be masked completely.
        num_scored (`int`):
            T: how many of the last columns are scored. A scored token needs an unmasked token before it.

    Returns:
        [`PackedRows`] on the device of `input_ids`.
    """
    tokens, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
    fold = _folded([row[keep] for row, keep in zip(tokens, mask, strict=True)])
    index, is_scored = _predictors(fold.paths, mask, num_scored)
    needs_label = np.zeros(len(fold.tokens), dtype=bool)
    needs_label[index[is_scored]] = True

    def to_tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(input_ids.device)

    return PackedRows(
        input_ids=to_tensor(fold.tokens)[None],
        position_ids=to_tensor(fold.depths)[None],
        last_descendants=to_tensor(fold.last_descendants),
        shift_labels=to_tensor(np.where(needs_label, fold.next_tokens, -100))[None],
        num_rows=to_tensor(np.bincount(np.concatenate(fold.paths), minlength=len(fold.tokens)))[None],
        index=to_tensor(index),
        is_scored=to_tensor(is_scored),
        num_row_tokens=int(mask.sum()),
        num_padded_tokens=mask.size,
    )


class _Fold(NamedTuple):
    """Rows as one, a value for each of its positions."""

    tokens: np.ndarray
    depths: np.ndarray
    next_tokens: np.ndarray
    """-100 at the end of a row."""
    last_descendants: np.ndarray
    paths: list[np.ndarray]
    """Of each row: its positions."""


def _folded(rows: list[np.ndarray]) -> _Fold:
    """The positions of rows in depth-first order, those that they share once each."""
    # Sorting the rows puts a row next to the one that it shares most with, in depth-first order.
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u8").tobytes())
    new_tokens, new_depths, next_tokens = [], [], []
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    last = np.zeros(sum(map(len, rows)), dtype=np.int64)
    num_nodes = 0
    previous = path = np.empty(0, dtype=np.int64)
    for i in order:
        row = rows[i]
        num_shared = _num_shared_positions(previous, row)
        last[path[num_shared:]] = num_nodes - 1  # the previous row leaves these subtrees
        num_new = len(row) - num_shared
        path = np.concatenate([path[:num_shared], np.arange(num_nodes, num_nodes + num_new)])
        new_tokens.append(row[num_shared:])
        new_depths.append(np.arange(num_shared, len(row)))
        next_tokens.append(np.append(row[num_shared + 1 :], -100)[:num_new])
        paths[i], previous = path, row
        num_nodes += num_new
    last[path] = num_nodes - 1
    if num_nodes == 0:  # every row is masked: one padding token keeps the model's forward valid
        new_tokens, new_depths, next_tokens = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.full(1, -100)]
        last, num_nodes = np.zeros(1, np.int64), 1
    return _Fold(
        np.concatenate(new_tokens), np.concatenate(new_depths), np.concatenate(next_tokens), last[:num_nodes], paths
    )


def _predictors(paths: list[np.ndarray], mask: np.ndarray, num_scored: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed position that predicts each scored token `(B, T)`, and which entries mean something."""
    index = np.zeros((len(paths), num_scored), dtype=np.int64)
    is_scored = np.zeros((len(paths), num_scored), dtype=bool)
    first_scored = mask.shape[1] - num_scored
    for i, path in enumerate(paths):
        column = np.flatnonzero(mask[i])
        target = np.flatnonzero(column[1:] >= first_scored)  # position of the predicting token in its row
        index[i, column[target + 1] - first_scored] = path[target]
        is_scored[i, column[target + 1] - first_scored] = True
    return index, is_scored


def _num_shared_positions(a: np.ndarray, b: np.ndarray) -> int:
    """Positions that two rows share together with their next token; the end of a row counts as a next token."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    if len(differs) == 0 and len(a) == len(b):
        return len(a)
    common = differs[0] if len(differs) else shorter
    return max(int(common) - 1, 0)


def cut_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_scored: int, max_tokens: int) -> list[slice]:
    """
    Cut consecutive rows into pieces that each pack to at most `max_tokens`, whole trees where they fit.

    Consecutive rows with the same prompt are a tree, counted as if each row shared tokens with the one before it alone
    (exact in depth-first order). A piece is closed where the next tree does not fit any more; a tree that fits no
    piece is cut between its rows, in their order, and a row longer than `max_tokens` has a piece of its own.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`, int64), attention_mask (`torch.Tensor` of shape `(B, L)`):
            Rows, those that share most next to each other.
        num_scored (`int`):
            Completion columns at the end of the rows; the prompt is before them.
        max_tokens (`int`):
            Unique tokens per piece.

    Returns:
        `list[slice]`: the rows of each piece, in order, every row in one.
    """
    tokens, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
    rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    prompts = [row[:-num_scored][keep[:-num_scored]].tobytes() for row, keep in zip(tokens, mask, strict=True)]
    # What a row adds to a piece that holds the row before it; never less than what it adds to the packed row.
    added = [len(row) - _num_shared_positions(before, row) for before, row in pairwise(rows)]
    added = [len(rows[0]) if rows else 0, *added]
    first_of_tree = [i for i in range(len(rows)) if i == 0 or prompts[i] != prompts[i - 1]]

    pieces, start, size = [], 0, 0
    for first, end in zip(first_of_tree, [*first_of_tree[1:], len(rows)], strict=True):
        is_cut = len(rows[first]) + sum(added[first + 1 : end]) > max_tokens
        if size + sum(added[first:end]) > max_tokens and start < first:
            pieces.append(slice(start, first))
            start, size = first, 0
        for i in range(first, end):
            new = added[i] if start < i else len(rows[i])
            if is_cut and start < i and size + new > max_tokens:
                pieces.append(slice(start, i))
                start, size, new = i, 0, len(rows[i])
            size += new
    return [*pieces, slice(start, len(rows))]
