"""
Keys and values for rows of different length: where the transformers engine keeps them and how attention reads them.

[`Block`] keeps the states of a segment below those of its parent, [`BlockCache`] bounds how many are kept,
[`SlotLayer`] lets the model write into a window of the engine's storage, and the attention function registered as
`ROW_ATTENTION` reads it with a boolean mask.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin


ROW_ATTENTION = "treepo_rows"
ROW_ATTENTION_WITHOUT_SOFTCAP = "treepo_rows_without_softcap"
"""For policies that train without the soft cap of their scores, as SDPA of transformers leaves it out."""


def attend(
    module: nn.Module,  # noqa: ARG001 - the interface's first argument
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,  # noqa: ARG001 - what other attentions need
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot product attention of (rows, heads, queries, head_dim) over grouped keys with a boolean mask.

    With one query per row, the query heads that share a key head become its queries, so keys are not copied per head.
    `softcap` bounds the scores in the shape of a tanh. `s_aux` (heads,) are scores of sinks, which have no value.
    """
    num_rows, num_heads, num_queries, head_dim = query.shape
    num_groups = num_heads // key.size(1)
    if num_queries == 1:
        query = query.view(num_rows, key.size(1), num_groups, head_dim)
    elif num_groups > 1:
        key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    if softcap is None and s_aux is None:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        sinks = None if s_aux is None else s_aux.view(1, query.size(1), -1, 1)  # (1, key heads, queries or 1, 1)
        scores = query @ key.transpose(-1, -2) * (head_dim**-0.5 if scaling is None else scaling)
        output = _weights(scores, attention_mask, softcap, sinks).to(value.dtype) @ value
    return output.reshape(num_rows, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


def attend_without_softcap(*args: object, softcap: object = None, **kwargs: object) -> tuple[torch.Tensor, None]:  # noqa: ARG001
    """[`attend`] over scores without a bound."""
    return attend(*args, **kwargs)  # pyright: ignore[reportArgumentType]


def _weights(
    scores: torch.Tensor, mask: torch.Tensor, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention weights from scores, in float32."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf).float()
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


AttentionInterface.register(ROW_ATTENTION, attend)
AttentionInterface.register(ROW_ATTENTION_WITHOUT_SOFTCAP, attend_without_softcap)


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
    last_used: int = 0
    """Count of the cache at which the block was last looked up or added."""
    is_kept: bool = False
    """Whether the block is found from the cache's root."""

    def chain(self) -> Iterator["Block"]:
        """This block and its ancestors that hold tokens, last first."""
        block = self
        while block.parent is not None:
            yield block
            block = block.parent


class BlockCache:
    """
    The tree of blocks, with the least recently used leaves dropped when it holds too many tokens.

    A request in flight keeps the blocks that it needs alive, dropped or not.

    Args:
        max_tokens (`int` or `None`):
            Tokens to keep; `None` keeps all.
    """

    def __init__(self, max_tokens: int | None) -> None:
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Drop every block."""
        self.root, self.num_tokens, self._count = Block([], None), 0, 0

    def find(self, token_ids: list[int], limit: int) -> Block:
        """The last block whose tokens, from the beginning on, are those of `token_ids[:limit]`."""
        self._count += 1
        block, position = self.root, 0
        while True:
            for child in block.children:
                if child.end <= limit and token_ids[position : child.end] == child.token_ids:
                    block, position = child, child.end
                    block.last_used = self._count
                    break
            else:
                return block

    def keep(self, parent: Block, token_ids: list[int], states: torch.Tensor) -> Block:
        """The block with these tokens below `parent`, which is added unless it is there."""
        self._count += 1
        for child in parent.children:
            if child.token_ids == token_ids:
                child.last_used = self._count
                return child
        child = Block(token_ids, states, parent, end=parent.end + len(token_ids), last_used=self._count)
        chain = list(child.chain())
        if chain[-1].parent is not self.root:  # of a request from before `clear`
            return child
        for block in chain:  # ancestors too, in case they were dropped while a request held them
            assert block.parent is not None, "the root is not part of a chain"
            if block.is_kept:
                break
            block.parent.children.append(block)
            block.is_kept, block.last_used = True, self._count
            self.num_tokens += len(block.token_ids)
        if self.max_tokens is not None and self.num_tokens > self.max_tokens:
            self._drop(self.max_tokens * 3 // 4)  # a quarter at once, so that it is seldom
        return child

    def _drop(self, num_tokens: int) -> None:
        """Drop leaves, the least recently used first, until at most `num_tokens` are kept."""
        stack, leaves = [self.root], list[tuple[int, int, Block]]()
        while stack:
            block = stack.pop()
            stack.extend(block.children)
            if not block.children and block.parent is not None:
                leaves.append((block.last_used, id(block), block))
        heapq.heapify(leaves)
        while self.num_tokens > num_tokens and leaves:
            _, _, block = heapq.heappop(leaves)
            parent = block.parent
            assert parent is not None, "the root is no leaf"
            parent.children.remove(block)
            block.is_kept = False
            self.num_tokens -= len(block.token_ids)
            if not parent.children and parent.parent is not None:
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))


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
