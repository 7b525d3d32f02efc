"""
Attention over a packed row, in which a token attends to itself and its ancestors only.

One function with two backends: SDPA over blocks of queries, each with just the keys that it can see, and
FlexAttention. Both need memory linear in the row. `serve_trees` puts it in front of an attention function of
transformers, under that function's own name. The choice travels with the call (`model(..., tree_attention=...)`). So a
layer that gradient checkpointing computes again in the backward pass makes the same choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward


AttentionBackend = Literal["sdpa", "flex"]

_FLEX_BLOCK = 128  # positions; FlexAttention's own block size
_QUERY_BLOCK = 256  # on a processor: small blocks waste little
_DEVICE_QUERY_BLOCK = 1024  # elsewhere: a block is a few kernel launches
_MAX_KEPT_COPIES = 4
"""Copies of a row's keys that are kept for the backward pass, together with the blocks' masks. Where there would be
more, blocks are attended again instead."""


@dataclass(frozen=True)
class QueryBlock:
    """Consecutive queries `start` to `end` of a packed row and the keys that any of them sees."""

    start: int
    end: int
    keys: torch.Tensor
    """`(K,)` int64: ancestors of the first query, then the block's own positions."""
    last_descendants: torch.Tensor
    """`(K,)` int64: the keys' last descendants."""

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """`(end - start, K)`: 0 where the query attends to the key, -inf elsewhere."""
        queries = torch.arange(self.start, self.end, device=self.keys.device)[:, None]
        is_hidden = (self.keys > queries) | (queries > self.last_descendants)
        return torch.zeros(is_hidden.shape, dtype=dtype, device=self.keys.device).masked_fill_(is_hidden, -torch.inf)


class TreeAttention:
    """
    What the attention layers need to know about a packed row.

    Args:
        last_descendants (`torch.Tensor` of shape `(N,)`, int64):
            Last packed position that each position is an ancestor of, positions in depth-first order.
        backend (`str`):
            `"sdpa"`, or `"flex"` (no backward pass on a processor).
        query_block (`int`, *optional*):
            Queries per block of the `sdpa` backend.
    """

    def __init__(
        self, last_descendants: torch.Tensor, backend: AttentionBackend, query_block: int | None = None
    ) -> None:
        self.backend = backend
        self._last = last_descendants
        on_cpu = last_descendants.device.type == "cpu"
        self._query_block = query_block or (_QUERY_BLOCK if on_cpu else _DEVICE_QUERY_BLOCK)
        self._blocks: list[QueryBlock] | None = None
        self._masks: dict[torch.dtype, list[torch.Tensor]] = {}
        self._block_mask: BlockMask | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float,
        scaling: float | None,
    ) -> torch.Tensor:
        """
        Attention of `(1, H, N, d)` queries over `(1, H_kv, N, d)` keys and values, as `(1, N, H, d)`.
        """
        if self.backend == "flex":
            return self._flex(module, query, key, value, dropout, scaling)
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # as SDPA does by itself; the backward pass is outside of autocast
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        blocks = self.query_blocks()
        num_keys = sum(len(block.keys) for block in blocks)
        # With dropout, a block that is attended again would lose other weights than the first time.
        if dropout > 0 or num_keys <= _MAX_KEPT_COPIES * len(self._last):
            if query.dtype not in self._masks:
                self._masks[query.dtype] = [block.mask(query.dtype) for block in blocks]  # once for all layers
            output = _attend_blocks(blocks, self._masks[query.dtype], query, key, value, dropout, scaling)
        else:
            output = cast(torch.Tensor, _AttendAgain.apply(query, key, value, blocks, scaling))
        return output.transpose(1, 2).contiguous()

    def query_blocks(self) -> list[QueryBlock]:
        """The blocks of the `sdpa` backend. Built once for all layers."""
        if self._blocks is None:
            self._blocks = [self._query_block_at(i) for i in range(0, len(self._last), self._query_block)]
        return self._blocks

    def _query_block_at(self, start: int) -> QueryBlock:
        end = min(start + self._query_block, len(self._last))
        # In depth-first order, the ancestors of a position are those before it whose subtree has not ended.
        path = torch.nonzero(self._last[:start] >= start).flatten()
        keys = torch.cat([path, torch.arange(start, end, device=path.device)])
        return QueryBlock(start, end, keys, self._last[keys])

    def _flex(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float,
        scaling: float | None,
    ) -> torch.Tensor:
        length = query.size(2)
        padding = flex_length(length) - length
        query, key, value = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
        output, _ = flex_attention_forward(
            module, query, key, value, self.block_mask(), scaling=scaling, dropout=dropout
        )
        return output[:, :length]

    def block_mask(self) -> BlockMask:
        """The mask of the `flex` backend, padded to `flex_length`. Built once for all layers."""
        if self._block_mask is None:
            length = len(self._last)
            padded = torch.arange(flex_length(length), device=self._last.device)  # padding attends to itself
            padded[:length] = self._last
            self._block_mask = _block_mask(padded)
        return self._block_mask


def flex_length(length: int) -> int:
    """Length that FlexAttention pads a row of `length` positions to: a power of two, so that few shapes compile."""
    return max(1 << (length - 1).bit_length(), _FLEX_BLOCK)


def _block_mask(last: torch.Tensor) -> BlockMask:
    """
    FlexAttention's mask from the last descendants, without looking at single pairs of positions.

    A query block sees a key block before it if the latest subtree that starts there reaches it, and sees all of it if
    the earliest subtree to end reaches its last query.
    """
    blocks = last.view(-1, _FLEX_BLOCK)
    first_queries = torch.arange(len(blocks), device=last.device)[:, None] * _FLEX_BLOCK
    is_before = torch.ones(len(blocks), len(blocks), dtype=torch.bool, device=last.device).tril(-1)
    is_seen = is_before & (blocks.amax(1)[None, :] >= first_queries)
    is_full = is_before & (blocks.amin(1)[None, :] >= first_queries + _FLEX_BLOCK - 1)
    is_partial = (is_seen & ~is_full) | torch.eye(len(blocks), dtype=torch.bool, device=last.device)

    def counts_and_indices(block_pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = block_pairs.int().argsort(dim=1, descending=True, stable=True)
        return block_pairs.sum(1)[None, None].int(), order[None, None].int()

    def sees(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query <= last[key])

    return BlockMask.from_kv_blocks(
        *counts_and_indices(is_partial),
        *counts_and_indices(is_full),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(len(last), len(last)),
    )


def _attend_blocks(
    blocks: list[QueryBlock],
    masks: list[torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """All blocks, keeping each block's keys and values for the backward pass: `(1, H, N, d)`."""
    all_keys = torch.cat([block.keys for block in blocks])
    sizes = [len(block.keys) for block in blocks]
    keys = cast(torch.Tensor, _Gather.apply(key, all_keys)).split(sizes, dim=2)
    values = cast(torch.Tensor, _Gather.apply(value, all_keys)).split(sizes, dim=2)
    return torch.cat(
        [
            _attend(mask, query[:, :, block.start : block.end], own_key, own_value, dropout, scaling)
            for block, mask, own_key, own_value in zip(blocks, masks, keys, values, strict=True)
        ],
        dim=2,
    )


def _attend(
    mask: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """A block's own queries over its own keys and values."""
    _, num_heads, length, head_dim = query.shape
    num_groups = num_heads // key.size(1)
    # Query heads that share a key head become a batch, so that keys need no copy per query head.
    grouped = query.reshape(key.size(1), num_groups, length, head_dim).transpose(0, 1)
    output = F.scaled_dot_product_attention(
        grouped,
        key.expand(num_groups, -1, -1, -1),
        value.expand(num_groups, -1, -1, -1),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.transpose(0, 1).reshape(1, num_heads, length, value.size(-1))


class _GatherContext(FunctionCtx):
    saved_tensors: tuple[torch.Tensor]
    length: int


class _Gather(torch.autograd.Function):
    """`states[:, :, index]`, with the gradient summed in float32: states near the root collect from many blocks."""

    @staticmethod
    def forward(ctx: _GatherContext, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.length = states.size(2)
        return states.index_select(2, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GatherContext, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        sums = gradient.new_zeros(1, gradient.size(1), ctx.length, gradient.size(3), dtype=torch.float32)
        return sums.index_add_(2, index, gradient.float()).to(gradient.dtype), None


class _AttendAgainContext(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    blocks: list[QueryBlock]
    scaling: float | None


class _AttendAgain(torch.autograd.Function):
    """
    All blocks, keeping only queries, keys and values for the backward pass, which attends each block again.

    For long paths, where the blocks' own copies of keys would together be larger than those of plain rows.
    """

    @staticmethod
    def forward(
        ctx: _AttendAgainContext,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: list[QueryBlock],
        scaling: float | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scaling = blocks, scaling
        output = query.new_empty(*query.shape[:3], value.size(-1))
        for block in blocks:
            rows = slice(block.start, block.end)
            states = key.index_select(2, block.keys), value.index_select(2, block.keys)
            output[:, :, rows] = _attend(block.mask(query.dtype), query[:, :, rows], *states, 0.0, scaling)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttendAgainContext, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)  # as in `_Gather`
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for block in ctx.blocks:
            rows = slice(block.start, block.end)
            with torch.enable_grad():
                own_query = query[:, :, rows].detach().requires_grad_()
                own_key = key.index_select(2, block.keys).requires_grad_()
                own_value = value.index_select(2, block.keys).requires_grad_()
                output = _attend(block.mask(query.dtype), own_query, own_key, own_value, 0.0, ctx.scaling)
            gradients = torch.autograd.grad(output, (own_query, own_key, own_value), grad_output[:, :, rows])
            grad_query[:, :, rows] = gradients[0]
            grad_key.index_add_(2, block.keys, gradients[1].float())
            grad_value.index_add_(2, block.keys, gradients[2].float())
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def serve_trees(implementation: str) -> None:
    """
    Let models with this attention implementation take `tree_attention` in their forward; plain calls stay as they are.

    Args:
        implementation (`str`):
            Name in transformers' `AttentionInterface`, such as `"sdpa"` or `"flash_attention_2"`. `"eager"` is no such
            name: every model has its own.
    """
    plain = cast(_AttentionFunction, AttentionInterface()[implementation])
    if not isinstance(plain, _ServesTrees):
        AttentionInterface.register(implementation, _ServesTrees(plain))


_AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class _ServesTrees:
    """An attention function of transformers that uses `tree_attention` where it is given one."""

    def __init__(self, plain: _AttentionFunction) -> None:
        self.plain = plain

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        *args: object,
        tree_attention: TreeAttention | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if tree_attention is None:
            return self.plain(module, query, key, value, attention_mask, *args, **kwargs)
        for name in ("s_aux", "position_bias", "softcap", "sliding_window"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"Shared prefixes are not packed for attention with `{name}`. Set `tree_packing='off'`."
                )
        if args:
            raise ValueError(
                f"Shared prefixes are not packed: {type(module).__name__} gives its attention function arguments "
                "without names. Set `tree_packing='off'`."
            )
        dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
        return tree_attention(module, query, key, value, cast(float, dropout), cast("float | None", scaling)), None
