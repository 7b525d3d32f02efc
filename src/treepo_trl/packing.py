"""
Rows that share prefixes, folded into one row that holds every shared token once, and back.

The packed row is laid out depth-first: a token attends to itself and to its ancestors only, its position is its depth,
and its label is its next token, so a causal language model gives it exactly the log-probability that it has in each
plain row. Pure torch and numpy; knows neither trainer nor engine.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch


TreePacking = Literal["auto", "off", "sdpa"]

_MAX_SDPA_LENGTH = 8192
"""Longest row for a dense 4-D mask under `auto`: 64 MiB of booleans."""
_MIN_RATIO = 1.15
"""Row tokens per packed token below which `auto` keeps plain rows: the mask costs more than it saves."""

_ALIBI = "it has ALiBi biases, which count packed positions instead of depths"
_RECURRENT = "it is recurrent"
_WINDOW = "it has attention windows that count packed positions instead of depths"
_ABSOLUTE = "its absolute positions make plain rows depend on their padding, which a packed row has not"
_UNPACKABLE_MODELS = {
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "jamba", "falcon_mamba", "recurrent_gemma", "xlstm"), _RECURRENT),
    **dict.fromkeys(("gpt_neo", "doge"), _WINDOW),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "biogpt", "xglm", "ctrl"), _ABSOLUTE),
}


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
    index: torch.Tensor
    """`(B, T)` int64: packed position that predicts each scored token, 0 where there is none."""
    is_scored: torch.Tensor
    """`(B, T)` bool: which entries of `index` mean something."""
    num_row_tokens: int
    """Tokens of the plain rows, padding left out."""

    @property
    def ratio(self) -> float:
        """Plain row tokens per packed token: how much the rows share."""
        return self.num_row_tokens / self.input_ids.size(1)

    def attention_mask(self) -> torch.Tensor:
        """`(1, 1, N, N)` bool: True where the query (third axis) may attend to the key."""
        query = torch.arange(self.input_ids.size(1), device=self.input_ids.device)
        key = query[None, :]
        mask = (key <= query[:, None]) & (query[:, None] <= self.last_descendants[None, :])
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
    rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    columns = [np.flatnonzero(keep) for keep in mask]
    # Sorting the rows puts a row next to the one that it shares most with, in depth-first order.
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u8").tobytes())

    new_tokens, new_depths, new_labels = [], [], []
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    last = np.zeros(sum(map(len, rows)), dtype=np.int64)
    num_nodes = 0
    previous = np.empty(0, dtype=tokens.dtype)
    path = np.empty(0, dtype=np.int64)
    for i in order:
        row = rows[i]
        num_shared = _num_shared_positions(previous, row)
        last[path[num_shared:]] = num_nodes - 1  # the previous row leaves these subtrees
        num_new = len(row) - num_shared
        path = np.concatenate([path[:num_shared], np.arange(num_nodes, num_nodes + num_new)])
        new_tokens.append(row[num_shared:])
        new_depths.append(np.arange(num_shared, len(row)))
        new_labels.append(np.append(row[num_shared + 1 :], -100)[:num_new])
        paths[i], previous = path, row
        num_nodes += num_new
    last[path] = num_nodes - 1

    index = np.zeros((len(rows), num_scored), dtype=np.int64)
    is_scored = np.zeros((len(rows), num_scored), dtype=bool)
    needs_label = np.zeros(max(num_nodes, 1), dtype=bool)
    first_scored = tokens.shape[1] - num_scored
    for i, (path, column) in enumerate(zip(paths, columns, strict=True)):
        target = np.flatnonzero(column[1:] >= first_scored)  # position of the predicting token in its row
        index[i, column[target + 1] - first_scored] = path[target]
        is_scored[i, column[target + 1] - first_scored] = True
        needs_label[path[target]] = True

    def to_tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(input_ids.device)

    if num_nodes == 0:  # every row is masked: one padding token keeps the model's forward valid
        new_tokens, new_depths, new_labels = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.full(1, -100)]
        last, num_nodes = np.zeros(1, np.int64), 1
    labels = np.where(needs_label, np.concatenate(new_labels), -100)
    return PackedRows(
        input_ids=to_tensor(np.concatenate(new_tokens))[None],
        position_ids=to_tensor(np.concatenate(new_depths))[None],
        last_descendants=to_tensor(last[:num_nodes]),
        shift_labels=to_tensor(labels)[None],
        index=to_tensor(index),
        is_scored=to_tensor(is_scored),
        num_row_tokens=int(mask.sum()),
    )


def _num_shared_positions(a: np.ndarray, b: np.ndarray) -> int:
    """Positions that two rows share together with their next token; the end of a row counts as a next token."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    if len(differs) == 0 and len(a) == len(b):
        return len(a)
    common = differs[0] if len(differs) else shorter
    return max(int(common) - 1, 0)


def is_packable(model_config: Any) -> str | None:
    """
    Why a tree mask cannot serve a model; `None` if it can.

    Args:
        model_config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.
    """
    config = model_config.to_dict()
    attention = model_config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"its attention is {attention!r} (load it with `attn_implementation='sdpa'`)"
    layer_types = getattr(model_config, "layer_types", None)  # of some models a property, so not in the dictionary
    other = sorted(set(layer_types or []) - {"full_attention"})
    if other:
        return f"it has layers of type {', '.join(other)}"
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True) and not layer_types:
        return f"it has a sliding window of {config['sliding_window']} tokens"
    if config.get("alibi"):
        return _ALIBI
    return _UNPACKABLE_MODELS.get(model_config.model_type)


def is_worth_packing(packed: PackedRows) -> bool:
    """Whether the packed row is expected to cost less than the plain rows: the rule behind `tree_packing="auto"`."""
    return packed.ratio >= _MIN_RATIO and packed.input_ids.size(1) <= _MAX_SDPA_LENGTH


def model_inputs(packed: PackedRows, attn_implementation: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keyword arguments for a causal language model's forward over the packed row."""
    mask = packed.attention_mask()
    if attn_implementation == "eager":  # adds the mask to the scores
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": mask,
        "shift_labels": packed.shift_labels,
    }
