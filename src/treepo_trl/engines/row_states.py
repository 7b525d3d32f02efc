"""
Keys and values for rows of different length: where the transformers engine keeps them and how attention reads them.

[`Block`] keeps the states of a segment below those of its parent, [`SlotLayer`] lets the model write into a window of
the engine's storage, and the attention function registered as `ROW_ATTENTION` reads it with a boolean mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin


ROW_ATTENTION = "treepo_rows"


def attend(
    module: nn.Module,  # noqa: ARG001 - the interface's first argument
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot product attention of (rows, heads, queries, head_dim) over grouped keys with a boolean mask.

    With one query per row, the query heads that share a key head become its queries, so keys are not copied per head.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"The transformers engine does not support attention with `{name}`. Set `use_vllm=True`.")
    num_rows, num_heads, num_queries, head_dim = query.shape
    num_groups = num_heads // key.size(1)
    if num_queries == 1:
        query = query.view(num_rows, key.size(1), num_groups, head_dim)
    elif num_groups > 1:
        key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(num_rows, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ROW_ATTENTION, attend)


@dataclass(eq=False)
class Block:
    """Keys and values of consecutive tokens, below those of the parent block."""

    token_ids: list[int]
    states: torch.Tensor | None
    """(layers, 2, heads, tokens, head_dim); `None` for the empty root."""
    parent: "Block | None" = None
    children: list["Block"] = field(default_factory=list["Block"])
    end: int = 0
    """Tokens from the beginning of the sequence up to the end of this block."""

    def chain(self) -> Iterator["Block"]:
        """This block and its ancestors that hold tokens, last first."""
        block = self
        while block.parent is not None:
            yield block
            block = block.parent

    def find(self, token_ids: list[int], limit: int) -> "Block":
        """The last block whose tokens, from the beginning on, are those of `token_ids[:limit]`."""
        block, position = self, 0
        while True:
            for child in block.children:
                if child.end <= limit and token_ids[position : child.end] == child.token_ids:
                    block, position = child, child.end
                    break
            else:
                return block

    def add_child(self, token_ids: list[int], states: torch.Tensor) -> tuple["Block", bool]:
        """The child with these tokens and whether it is new."""
        for child in self.children:
            if child.token_ids == token_ids:
                return child, False
        child = Block(token_ids, states, self, end=self.end + len(token_ids))
        self.children.append(child)
        return child, True


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: a window of rows of the engine's storage, written at each row's own positions."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, length: int) -> None:
        super().__init__()  # keys and values of the base class are empty until the first update
        self.keys, self.values = keys, values  # (rows, heads, capacity, head_dim)
        self.positions, self.length = positions, length  # (rows, queries); tokens that any row can see
        self.rows = torch.arange(positions.size(0), device=positions.device)[:, None]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("The storage is allocated by the engine.")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[self.rows, :, self.positions] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[self.rows, :, self.positions] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.keys.size(2)
