"""
Attention over a packed row, in which a token attends to itself and its ancestors only.

One function with two backends: SDPA over blocks of queries, each with just the keys that it can see, and
FlexAttention. Both need memory linear in the row. `serve_trees` puts it in front of an attention function of
transformers, under that function's own name. The choice travels with the call (`model(..., tree_attention=...)`). So a
layer that gradient checkpointing computes again in the backward pass makes the same choice.

Layers may see less than all ancestors (windows, chunks): depths decide, which are the positions in plain rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from treepo_trl.model_support import FULL_REACH, Reach, leaves_out_softcap, reach_of_layer

from .block_attention import (
    PLAIN_SCORES,
    AttendAgain,
    QueryBlock,
    Scores,
    add_sinks,
    attend_blocks,
    query_block,
    with_sink,
)


AttentionBackend = Literal["sdpa", "flex"]

_FLEX_BLOCK = 128  # positions; FlexAttention's own block size
_QUERY_BLOCK = 256  # on a processor: small blocks waste little
_DEVICE_QUERY_BLOCK = 1024  # elsewhere: a block is a few kernel launches
_MAX_KEPT_COPIES = 4
"""Copies of a row's keys that are kept for the backward pass, together with the blocks' masks. Where there would be
more, blocks are attended again instead."""


@dataclass(frozen=True)
class LayerAttention:
    """What a layer wants of its attention beside the weights of its ancestors."""

    scores: Scores = PLAIN_SCORES
    reach: Reach = FULL_REACH
    sinks: torch.Tensor | None = None
    """`(H,)`: scores of keys without a value, one for each query head."""


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
        # Built once for all layers of a kind.
        self._depths: torch.Tensor | None = None
        self._blocks: dict[tuple[Reach, bool], list[QueryBlock]] = {}
        self._masks: dict[tuple[torch.dtype, Reach, bool], list[torch.Tensor]] = {}
        self._block_masks: dict[Reach, BlockMask] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """
        Attention of `(1, H, N, d)` queries over `(1, H_kv, N, d)` keys and values, as `(1, N, H, d)`.
        """
        if self.backend == "flex":
            return self._flex(module, query, key, value, layer)
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # as SDPA does by itself; the backward pass is outside of autocast
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        scores, has_sinks = layer.scores, layer.sinks is not None
        if layer.sinks is not None:
            scaling = query.size(-1) ** -0.5 if scores.scaling is None else scores.scaling
            scores = Scores(scores.dropout, scaling, scores.softcap)
            query, key, value = add_sinks(query, key, value, layer.sinks, scaling)
        blocks = self.query_blocks(layer.reach, has_sinks)
        num_keys = sum(len(block.keys) for block in blocks)
        if scores.dropout > 0 or num_keys <= _MAX_KEPT_COPIES * len(self._last):
            masks = self._masks_of(blocks, (query.dtype, layer.reach, has_sinks))
            output = attend_blocks(blocks, masks, query, key, value, scores)
        else:
            output = cast(torch.Tensor, AttendAgain.apply(query, key, value, blocks, scores))
        return output.transpose(1, 2).contiguous()

    def depths(self) -> torch.Tensor:
        """`(N,)` int64: the number of ancestors of each position."""
        if self._depths is None:
            # A position is an ancestor of those behind it up to its last descendant.
            steps = self._last.new_zeros(len(self._last) + 1)
            steps[1:] = 1
            steps.index_add_(0, self._last + 1, -torch.ones_like(self._last))
            self._depths = steps.cumsum(0)[:-1]
        return self._depths

    def query_blocks(self, reach: Reach = FULL_REACH, has_sinks: bool = False) -> list[QueryBlock]:
        """The blocks of the `sdpa` backend for layers that see that far."""
        key = reach, has_sinks
        if key not in self._blocks:
            length, depths = len(self._last), self.depths()
            blocks = [
                query_block(self._last, depths, i, min(i + self._query_block, length), reach)
                for i in range(0, length, self._query_block)
            ]
            self._blocks[key] = [with_sink(block) for block in blocks] if has_sinks else blocks
        return self._blocks[key]

    def _masks_of(self, blocks: list[QueryBlock], key: tuple[torch.dtype, Reach, bool]) -> list[torch.Tensor]:
        if key not in self._masks:
            self._masks[key] = [block.mask(key[0]) for block in blocks]
        return self._masks[key]

    def _flex(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
    ) -> torch.Tensor:
        length = query.size(2)
        padding = flex_length(length) - length
        query, key, value = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
        scores = layer.scores
        output, _ = flex_attention_forward(
            module,
            query,
            key,
            value,
            self.block_mask(layer.reach),
            scaling=scores.scaling,
            softcap=scores.softcap,
            s_aux=layer.sinks,
            dropout=scores.dropout,
        )
        return output[:, :length]

    def block_mask(self, reach: Reach = FULL_REACH) -> BlockMask:
        """The mask of the `flex` backend, padded to `flex_length`, for layers that see that far."""
        if reach not in self._block_masks:
            length = len(self._last)
            padded = torch.arange(flex_length(length), device=self._last.device)  # padding attends to itself
            padded[:length] = self._last
            depths = F.pad(self.depths(), (0, len(padded) - length), value=int(self.depths()[-1]))
            self._block_masks[reach] = _block_mask(padded, depths, reach)
        return self._block_masks[reach]


def flex_length(length: int) -> int:
    """Length that FlexAttention pads a row of `length` positions to: a power of two, so that few shapes compile."""
    return max(1 << (length - 1).bit_length(), _FLEX_BLOCK)


def _block_mask(last: torch.Tensor, depths: torch.Tensor, reach: Reach) -> BlockMask:
    """
    FlexAttention's mask from the last descendants and depths, without looking at single pairs of positions.

    A query block sees a key block before it if the latest subtree that starts there reaches it, and sees all of it if
    the earliest subtree to end reaches its last query. Where layers see less than all ancestors, blocks of keys that
    are too far from every query are left out, and those near enough to every query are seen whole.
    """
    blocks = last.view(-1, _FLEX_BLOCK)
    first_queries = torch.arange(len(blocks), device=last.device)[:, None] * _FLEX_BLOCK
    is_before = torch.ones(len(blocks), len(blocks), dtype=torch.bool, device=last.device).tril(-1)
    is_seen = is_before & (blocks.amax(1)[None, :] >= first_queries)
    is_full = is_before & (blocks.amin(1)[None, :] >= first_queries + _FLEX_BLOCK - 1)
    if reach != FULL_REACH:
        levels = depths.view(-1, _FLEX_BLOCK)
        lowest, highest = levels.amin(1), levels.amax(1)
        is_seen &= reach.sees(lowest[:, None], highest[None, :])
        is_full &= reach.sees(highest[:, None], lowest[None, :])
    is_partial = (is_seen & ~is_full) | torch.eye(len(blocks), dtype=torch.bool, device=last.device)

    def counts_and_indices(block_pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = block_pairs.int().argsort(dim=1, descending=True, stable=True)
        return block_pairs.sum(1)[None, None].int(), order[None, None].int()

    def sees(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_ancestor = (key <= query) & (query <= last[key])
        return is_ancestor if reach == FULL_REACH else is_ancestor & reach.sees(depths[query], depths[key])

    return BlockMask.from_kv_blocks(
        *counts_and_indices(is_partial),
        *counts_and_indices(is_full),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(len(last), len(last)),
    )


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
        AttentionInterface.register(implementation, _ServesTrees(plain, leaves_out_softcap(implementation)))


_AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class _ServesTrees:
    """An attention function of transformers that uses `tree_attention` where it is given one."""

    def __init__(self, plain: _AttentionFunction, leaves_out_softcap: bool) -> None:
        self.plain = plain
        self.leaves_out_softcap = leaves_out_softcap  # so must packed rows then, to be those of plain ones

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
        if kwargs.get("position_bias") is not None:
            raise ValueError(
                "Shared prefixes are not packed for attention with `position_bias`. Set `tree_packing='off'`."
            )
        if args:
            raise ValueError(
                f"Shared prefixes are not packed: {type(module).__name__} gives its attention function arguments "
                "without names. Set `tree_packing='off'`."
            )
        softcap = None if self.leaves_out_softcap else cast("float | None", kwargs.get("softcap"))
        scores = Scores(cast(float, kwargs.get("dropout", 0.0)), cast("float | None", kwargs.get("scaling")), softcap)
        reach = reach_of_layer(module, cast("int | None", kwargs.get("sliding_window")))
        sinks = cast("torch.Tensor | None", kwargs.get("s_aux"))
        return tree_attention(module, query, key, value, LayerAttention(scores, reach, sinks)), None
