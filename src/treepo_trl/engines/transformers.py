"""
Segments from an ordinary `transformers` model: no vLLM, any device.

Keys and values are kept per segment in a tree of blocks and copied into a batch row when a path continues, so a shared
prefix is computed once. Rows join and leave the running batch one by one, each with its own length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from treepo_trl.model_support import (
    FULL_REACH,
    is_heterogeneous,
    layer_reaches,
    leaves_out_softcap,
    other_layers,
    without_adapter,
)

from .base import SamplingOptions, SegmentRequest, SegmentResult
from .own_model import OwnModelEngine, Row, affordable_bytes, compare_with_plain_forward
from .row_states import ROW_ATTENTION, ROW_ATTENTION_WITHOUT_SOFTCAP, Block, BlockCache, SlotLayer


@dataclass(eq=False, kw_only=True)
class _BlockRow(Row):
    """A segment that is being sampled, in a slot of the storage."""

    block: Block
    """Holds the states of every token of the request but the last."""


class TransformersEngine(OwnModelEngine):
    """
    [`SegmentEngine`] over a causal language model in this process.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model with attention in every layer, full, in windows or in chunks.
        eos_token_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`], *optional*):
            How tokens are drawn. They come from torch's global generator of the model's device.
        max_batch_tokens (`int`, *optional*):
            Rows times longest row of the running batch; further requests wait. Bounds the memory of the batch.
            Default: what fits into a fifth of the CUDA card's memory, or into 4 GiB elsewhere.
        max_cached_tokens (`int`, *optional*):
            Tokens whose keys and values are kept for later requests; the same default. When it is exceeded, those that
            were used longest ago are dropped; what is needed again is computed again.
        with_entropies (`bool`, *optional*, defaults to `False`):
            Whether results carry the entropy of each token's distribution.

    Raises:
        ValueError: if the model's layers cannot serve rows of their own length. For such a model there is
            `engine_for_model`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: list[int],
        options: SamplingOptions | None = None,
        max_batch_tokens: int | None = None,
        max_cached_tokens: int | None = None,
        with_entropies: bool = False,
    ) -> None:
        config = model.config.get_text_config()
        reason = why_no_slots(model)
        if reason is not None:
            raise ValueError(
                f"`TransformersEngine` cannot sample from {type(model).__name__}, which has {reason}. Take "
                "`engine_for_model`, or set `use_vllm=True`."
            )
        super().__init__(model, eos_token_ids, options, with_entropies)
        self.block_size: int | None = None
        # A mixture of experts with a load-balancing loss would compute it here too, and misread this engine's mask.
        has_router = getattr(config, "output_router_logits", False)
        self._without_router_logits = {"output_router_logits": False} if has_router else {}
        self._num_layers = config.num_hidden_layers
        self._num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bytes_per_token = 2 * self._num_layers * self._num_heads * self._head_dim * model.dtype.itemsize
        affordable = affordable_bytes(model.device) // bytes_per_token
        self.max_batch_tokens = affordable if max_batch_tokens is None else max_batch_tokens
        most_cached: int = affordable if max_cached_tokens is None else max_cached_tokens
        self.num_cache_tokens: int | None = most_cached + self.max_batch_tokens
        self._reaches = layer_reaches(config)
        self._rows: list[_BlockRow] = []
        self._storage: torch.Tensor | None = None
        self._blocks = BlockCache(most_cached)
        self._to_compare: tuple[list[int], torch.Tensor] | None = None

    def num_slots(self, length: int) -> int | None:
        """Rows of the batch that the token budget allows when the longest has `length` tokens."""
        return max(self.max_batch_tokens // length, 1) if length else None

    @torch.no_grad()
    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        """Decode until at least one queued segment is done, or `wake` is true; returns the finished ones."""
        results: list[SegmentResult] = []
        with self._row_attention():
            if self._pending:
                self._admit()
            while self._rows and not results and not (wake is not None and wake()):
                results = self._step()
        if self._to_compare is not None:
            compare_with_plain_forward(self.model, *self._to_compare)
            self._to_compare, self._has_compared = None, True
        return results

    @contextmanager
    def _row_attention(self) -> Iterator[None]:
        """Drive the model with this engine's attention, whatever it trains with."""
        config = self.model.config
        trained_with = config._attn_implementation
        without_softcap = leaves_out_softcap(trained_with)
        config._attn_implementation = ROW_ATTENTION_WITHOUT_SOFTCAP if without_softcap else ROW_ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = trained_with

    def abort(self) -> None:
        """Drop all requests and everything kept."""
        self._pending, self._rows = [], []
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values, and free their memory. Needed after a change of the weights."""
        self._blocks.clear()
        self._storage = self._storage if self._rows else None

    # Admission

    def _admit(self) -> None:
        """Move waiting requests into the running batch, as far as the token budget allows."""
        self._drop_stale_states()
        length = max((len(row.request.token_ids) + row.request.max_tokens for row in self._rows), default=0)
        admitted = 0
        for request in self._pending:
            longest = max(length, len(request.token_ids) + request.max_tokens)
            num_rows = len(self._rows) + admitted + 1
            if num_rows > 1 and num_rows * longest > self.max_batch_tokens:
                break
            length, admitted = longest, admitted + 1
        requests, self._pending = self._pending[:admitted], self._pending[admitted:]
        if not requests:
            return
        # The last token of a request is fed while decoding, so it is never computed again.
        self.num_prompt_tokens += sum(len(request.token_ids) - 1 for request in requests)
        blocks = self._prefill(requests, length)
        first = len(self._rows)
        storage = self._reserve(first + len(requests), length)
        slots: dict[Block, list[int]] = {}
        for slot, (request, block) in enumerate(zip(requests, blocks, strict=True), start=first):
            self._rows.append(_BlockRow(request, block=block))
            slots.setdefault(block, []).append(slot)
        for block, rows in slots.items():
            self._load(storage, block, rows)

    def _prefill(self, requests: list[SegmentRequest], length: int) -> list[Block]:
        """For each request the block up to its last token; computes what is missing, each prefix once."""
        missing: dict[tuple[int, ...], tuple[Block, list[int]]] = {}
        keys = []
        for request in requests:
            limit = len(request.token_ids) - 1
            block = self._blocks.find(request.token_ids, limit)
            key = tuple(request.token_ids[:-1])
            keys.append((key, block))
            if block.end < limit:
                missing[key] = block, request.token_ids[block.end : limit]
        done: dict[tuple[int, ...], Block] = {}
        batch: list[tuple[tuple[int, ...], Block, list[int]]] = []
        for key, (block, tokens) in sorted(missing.items(), key=lambda item: len(item[0])):
            if batch and (len(batch) + 1) * len(key) > self.max_batch_tokens:
                self._prefill_batch(batch, length, done)
                batch = []
            batch.append((key, block, tokens))
        if batch:
            self._prefill_batch(batch, length, done)
        return [done[key] if key in missing else block for key, block in keys]

    def _prefill_batch(
        self,
        batch: list[tuple[tuple[int, ...], Block, list[int]]],
        length: int,
        done: dict[tuple[int, ...], Block],
    ) -> None:
        first = len(self._rows)
        storage = self._reserve(first + len(batch), length)
        device = self.model.device
        num_queries = max(len(tokens) for _, _, tokens in batch)
        input_ids = torch.zeros(len(batch), num_queries, dtype=torch.long)
        positions = torch.zeros(len(batch), num_queries, dtype=torch.long)
        for i, (_, block, tokens) in enumerate(batch):
            self._load(storage, block, [first + i])
            input_ids[i, : len(tokens)] = torch.tensor(tokens)
            # Padding repeats the row's last slot after the real tokens, which nothing reads before it is overwritten.
            positions[i] = torch.arange(block.end, block.end + num_queries).clamp(max=storage.size(4) - 1)
        self._forward(slice(first, first + len(batch)), input_ids.to(device), positions.to(device), logits=False)
        for i, (key, block, tokens) in enumerate(batch):
            states = storage[:, :, first + i, :, block.end : block.end + len(tokens)].clone()
            done[key] = self._blocks.keep(block, tokens, states)
            self.num_prefilled_tokens += len(tokens)

    # Storage

    def _reserve(self, num_rows: int, length: int) -> torch.Tensor:
        """The storage (layers, 2, rows, heads, tokens, head_dim), grown to at least the given size."""
        old = self._storage
        if old is not None:
            most_rows, longest = max(num_rows, old.size(2)), max(length, old.size(4))
            if (most_rows, longest) == (old.size(2), old.size(4)):
                return old
            if most_rows * longest <= self.max_batch_tokens:  # else many short rows and few long ones multiply
                num_rows, length = most_rows, longest
        shape = (self._num_layers, 2, num_rows, self._num_heads, length, self._head_dim)
        if not self._rows:
            self._storage = old = None  # frees the memory before the new one is taken
        new = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        if old is not None:
            kept = min(length, old.size(4))
            new[:, :, : len(self._rows), :, :kept] = old[:, :, : len(self._rows), :, :kept]
        self._storage = new
        return new

    def _load(self, storage: torch.Tensor, block: Block, slots: list[int]) -> None:
        """Copy the states of a block and its ancestors into batch rows."""
        index = torch.tensor(slots, device=storage.device)
        for part in block.chain():
            assert part.states is not None, "only the root is empty"
            storage[:, :, index, :, part.end - len(part.token_ids) : part.end] = part.states[:, :, None]

    # Decoding

    def _forward(
        self, rows: slice, input_ids: torch.Tensor, positions: torch.Tensor, logits: bool
    ) -> torch.Tensor | None:
        """Run the model on (rows, queries) tokens at their positions; last logits (rows, vocab) in float32."""
        assert self._storage is not None, "reserved by the caller"
        length = int(positions.max()) + 1
        layers = [SlotLayer(layer[0, rows], layer[1, rows], positions, length) for layer in self._storage]
        keys, queries = torch.arange(length, device=positions.device), positions[:, None, :, None]
        causal = keys <= queries  # (rows, 1, queries, keys)
        masks = {
            kind: causal if reach == FULL_REACH else causal & reach.sees(queries, keys)
            for kind, reach in self._reaches.items()
        }
        outputs = self.model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: Cache(layers=[*layers])},
            **self._without_router_logits,
        )
        return outputs.logits[:, -1].float() if logits else None

    def _step(self) -> list[SegmentResult]:
        """One token for every running row; results of the rows that are done."""
        device = self.model.device
        input_ids = torch.tensor([[row.next_input] for row in self._rows], device=device)
        positions = torch.tensor([[row.position] for row in self._rows], device=device)
        logits = self._forward(slice(0, len(self._rows)), input_ids, positions, logits=True)
        assert logits is not None, "asked for"
        if not self._has_compared:
            self._to_compare = self._rows[0].path, logits[0]
        results, finished = [], []
        for slot, result in enumerate(self._draw_next(self._rows, logits)):
            if result is None:
                continue
            results.append(result)
            finished.append(slot)
            if result.finish_reason == "length":
                self._keep_row(slot)
        for slot in reversed(finished):
            self._free(slot)
        return results

    def _keep_row(self, slot: int) -> None:
        """Store a finished segment's states for its children: everything but the last token, which was never fed."""
        row = self._rows[slot]
        assert self._storage is not None, "the row is running"
        start, end = row.block.end, row.position
        token_ids = row.path[start:end]
        states = self._storage[:, :, slot, :, start:end].clone()
        self._blocks.keep(row.block, token_ids, states)

    def _free(self, slot: int) -> None:
        """Remove a row; the last row takes its place."""
        last = self._rows.pop()
        if slot == len(self._rows):
            return
        assert self._storage is not None, "a row was running"
        end = last.position
        self._storage[:, :, slot, :, :end] = self._storage[:, :, len(self._rows), :, :end]
        self._rows[slot] = last


def why_no_slots(model: PreTrainedModel) -> str | None:
    """What a model has that [`TransformersEngine`] cannot keep in slots, such as "ALiBi biases"; `None` if nothing."""
    base = without_adapter(model)
    config = base.config.get_text_config()
    other = other_layers(config)
    if other is not None:
        return other
    if getattr(config, "alibi", False):
        return "ALiBi biases"
    if is_heterogeneous(config):
        return "layers of different sizes"
    if not base._supports_attention_backend:
        return "layers that do not go through transformers' common attention interface"
    reasons = {
        "v_head_dim": "multi-head latent attention",
        "num_kv_shared_layers": "layers that share their keys",
        "attn_temperature_tuning": "attention scales that count tokens",
    }
    return next((reason for name, reason in reasons.items() if getattr(config, name, None)), None)
