"""
SDPA over blocks of queries of a packed row, each with just the keys that any of its queries sees.

Knows blocks and states, and no model: [`tree_attention`] says which keys a block has, and in which layer.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from treepo_trl.model_support import FULL_REACH, Reach


@dataclass(frozen=True)
class Scores:
    """How a layer makes weights of the products of queries and keys."""

    dropout: float = 0.0
    scaling: float | None = None
    """Factor of the products; one over the root of the head size by default."""
    softcap: float | None = None
    """Bound that products go to in the shape of a tanh; none by default."""


PLAIN_SCORES = Scores()


@dataclass(frozen=True)
class QueryBlock:
    """Consecutive queries `start` to `end` of a packed row and the keys that any of them sees."""

    start: int
    end: int
    keys: torch.Tensor
    """`(K,)` int64: ancestors of the first query, then the block's own positions, then the sink where there is one."""
    last_descendants: torch.Tensor
    """`(K,)` int64: the keys' last descendants."""
    depths: torch.Tensor
    """`(N,)` int64: number of ancestors of each position of the row."""
    reach: Reach = FULL_REACH
    has_sink: bool = False
    """Whether the last key is one that every query sees."""

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """`(end - start, K)`: 0 where the query attends to the key, -inf elsewhere."""
        queries = torch.arange(self.start, self.end, device=self.keys.device)[:, None]
        is_hidden = (self.keys > queries) | (queries > self.last_descendants)
        if self.reach != FULL_REACH:
            own = self.keys.clamp(max=len(self.depths) - 1)  # the sink is no position
            is_hidden |= ~self.reach.sees(self.depths[queries], self.depths[own])
        if self.has_sink:
            is_hidden[:, -1] = False
        return torch.zeros(is_hidden.shape, dtype=dtype, device=self.keys.device).masked_fill_(is_hidden, -torch.inf)


def query_block(last: torch.Tensor, depths: torch.Tensor, start: int, end: int, reach: Reach) -> QueryBlock:
    """
    The block of queries `start` to `end` of a packed row, without a sink.

    Args:
        last (`torch.Tensor` of shape `(N,)`, int64), depths (`torch.Tensor` of shape `(N,)`, int64):
            Last descendant and number of ancestors of each position.
        start (`int`), end (`int`):
            The block's queries.
        reach ([`Reach`]):
            How far they see.
    """
    # In depth-first order, the ancestors of a position are those before it whose subtree has not ended.
    path = torch.nonzero(last[:start] >= start).flatten()
    if reach != FULL_REACH:
        # The first queries of the block descend from a key; the one of least depth among them is the nearest to it.
        nearest = depths[start:end].cummin(0).values[last[path].clamp(max=end - 1) - start]
        path = path[reach.sees(nearest, depths[path])]
    keys = torch.cat([path, torch.arange(start, end, device=path.device)])
    return QueryBlock(start, end, keys, last[keys], depths, reach)


def with_sink(block: QueryBlock) -> QueryBlock:
    """The block with one key more, that of `add_sinks`, behind the row's own."""
    sink = torch.tensor([len(block.depths)], device=block.keys.device)
    keys, last = torch.cat([block.keys, sink]), torch.cat([block.last_descendants, sink])
    return QueryBlock(block.start, block.end, keys, last, block.depths, block.reach, has_sink=True)


_SINK_COLUMNS = 8  # one would do, but kernels want head sizes that they can divide


def add_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    States with one key more, whose score is that of the query head's sink and whose value is zero.

    A sink takes weight from the keys and gives nothing, in a softmax that SDPA does not have. Its score depends on the
    query head alone, so it stands in a column of the queries that only the additional key reads.

    Args:
        query (`torch.Tensor` of shape `(1, H, N, d)`), key, value (`torch.Tensor` of shape `(1, H_kv, N, d)`):
            States of a row.
        sinks (`torch.Tensor` of shape `(H,)`):
            Scores of the sinks.
        scaling (`float`):
            What products are multiplied by.
    """
    columns = F.pad((sinks / scaling).to(query.dtype)[:, None], (0, _SINK_COLUMNS - 1))
    query = torch.cat([query, columns[None, :, None].expand(1, -1, query.size(2), -1)], dim=-1)
    key = F.pad(key, (0, _SINK_COLUMNS, 0, 1))
    key[:, :, -1, -_SINK_COLUMNS] = 1
    return query, key, F.pad(value, (0, 0, 0, 1))


def attend_blocks(
    blocks: list[QueryBlock],
    masks: list[torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """All blocks, keeping each block's keys and values for the backward pass: `(1, H, N, d)`."""
    all_keys = torch.cat([block.keys for block in blocks])
    sizes = [len(block.keys) for block in blocks]
    keys = cast(torch.Tensor, _Gather.apply(key, all_keys)).split(sizes, dim=2)
    values = cast(torch.Tensor, _Gather.apply(value, all_keys)).split(sizes, dim=2)
    return torch.cat(
        [
            _attend(mask, query[:, :, block.start : block.end], own_key, own_value, scores)
            for block, mask, own_key, own_value in zip(blocks, masks, keys, values, strict=True)
        ],
        dim=2,
    )


def _attend(
    mask: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """A block's own queries over its own keys and values."""
    _, num_heads, length, head_dim = query.shape
    num_groups = num_heads // key.size(1)
    # Query heads that share a key head become a batch, so that keys need no copy per query head.
    grouped = query.reshape(key.size(1), num_groups, length, head_dim).transpose(0, 1)
    key, value = key.expand(num_groups, -1, -1, -1), value.expand(num_groups, -1, -1, -1)
    if scores.softcap is None:
        output = F.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, dropout_p=scores.dropout, scale=scores.scaling
        )
    else:
        output = _attend_softcapped(mask, grouped, key, value, scores, scores.softcap)
    return output.transpose(0, 1).reshape(1, num_heads, length, value.size(-1))


def _attend_softcapped(
    mask: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: Scores,
    softcap: float,
) -> torch.Tensor:
    """SDPA with bounded products, which its kernels do not have."""
    products = query @ key.transpose(-1, -2) * (query.size(-1) ** -0.5 if scores.scaling is None else scores.scaling)
    weights = (torch.tanh(products / softcap) * softcap + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, scores.dropout) @ value


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
    scores: Scores


class AttendAgain(torch.autograd.Function):
    """
    All blocks, keeping only queries, keys and values for the backward pass, which attends each block again.

    For long paths, where the blocks' own copies of keys would together be larger than those of plain rows. Without
    dropout: a block that is attended again would lose other weights than the first time.
    """

    @staticmethod
    def forward(
        ctx: _AttendAgainContext,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: list[QueryBlock],
        scores: Scores,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scores = blocks, scores
        output = query.new_empty(*query.shape[:3], value.size(-1))
        for block in blocks:
            rows = slice(block.start, block.end)
            states = key.index_select(2, block.keys), value.index_select(2, block.keys)
            output[:, :, rows] = _attend(block.mask(query.dtype), query[:, :, rows], *states, scores)
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
                output = _attend(block.mask(query.dtype), own_query, own_key, own_value, ctx.scores)
            gradients = torch.autograd.grad(output, (own_query, own_key, own_value), grad_output[:, :, rows])
            grad_query[:, :, rows] = gradients[0]
            grad_key.index_add_(2, block.keys, gradients[1].float())
            grad_value.index_add_(2, block.keys, gradients[2].float())
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
