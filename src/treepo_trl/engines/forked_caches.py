"""
Segments from a `transformers` model of any architecture that `generate` can serve, from copies of its own cache.

For layers whose memory is no list of keys: recurrent, convolutional and linear attention, latent attention, heads of
several sizes. A path's cache is copied for each of its children, and paths of the same length are decoded together.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from treepo_trl.model_support import without_adapter

from .base import SamplingOptions, SegmentRequest, SegmentResult
from .own_model import OwnModelEngine, Row, affordable_bytes, compare_with_plain_forward, no_cache_argument


@dataclass(eq=False)
class _Group:
    """Rows of the same length with their common cache, which holds all of their tokens but the last."""

    rows: list[Row]
    cache: DynamicCache


class ForkedCacheEngine(OwnModelEngine):
    """
    [`SegmentEngine`] over any causal language model in this process that has a cache.

    A prefix is computed once, and the state at its end is what its children start from. Each of them gets a copy of
    all of it, keys and values included.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        eos_token_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`], *optional*):
            How tokens are drawn. They come from torch's global generator of the model's device.
        max_batch_bytes (`int`, *optional*):
            Memory of the caches of a running batch; further requests wait. Default: a fifth of the CUDA card's memory,
            or 4 GiB elsewhere.
        max_cached_bytes (`int`, *optional*):
            Memory of the states that are kept for later requests; the same default. When it is exceeded, those that
            were used longest ago are dropped; what is needed again is computed again.
        with_entropies (`bool`, *optional*, defaults to `False`):
            Whether results carry the entropy of each token's distribution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: list[int],
        options: SamplingOptions | None = None,
        max_batch_bytes: int | None = None,
        max_cached_bytes: int | None = None,
        with_entropies: bool = False,
    ) -> None:
        super().__init__(model, eos_token_ids, options, with_entropies)
        base = without_adapter(model)
        arguments = inspect.signature(base.forward).parameters
        if "logits_to_keep" not in arguments:
            raise ValueError(no_cache_argument(base))
        self._takes_positions = "position_ids" in arguments
        affordable = affordable_bytes(model.device)
        self.max_batch_bytes = affordable if max_batch_bytes is None else max_batch_bytes
        self._states = _States(affordable if max_cached_bytes is None else max_cached_bytes)
        self._groups: list[_Group] = []

    @torch.no_grad()
    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        """Decode until at least one queued segment is done, or `wake` is true; returns the finished ones."""
        results: list[SegmentResult] = []
        while not results and (self._pending or self._groups) and not (wake is not None and wake()):
            if not self._groups:
                self._admit()
            results = self._step(self._groups[0])
        return results

    def abort(self) -> None:
        """Drop all requests and everything kept."""
        self._pending, self._groups = [], []
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Forget all states. Needed after a change of the weights."""
        self._states.clear()

    # Admission

    def _admit(self) -> None:
        """Start the waiting requests of one length, as far as the memory allows."""
        self._drop_stale_states()
        length = len(self._pending[0].token_ids)
        caches, rows = list[DynamicCache](), list[Row]()
        waiting: list[SegmentRequest] = []
        bytes_per_row, longest = 0, 0
        for request in self._pending:
            most = max(longest, length + request.max_tokens)
            if (
                len(request.token_ids) != length
                or (len(rows) + 1) * bytes_per_row * most > length * self.max_batch_bytes
            ):
                waiting.append(request)
                continue
            longest = most
            rows.append(Row(request))
            if length > 1:
                caches.append(self._state_of(tuple(request.token_ids[:-1])))
                bytes_per_row = max(bytes_per_row, _num_bytes(caches[-1]))
        self._pending = waiting
        self.num_prompt_tokens += len(rows) * (length - 1)
        self._groups.append(_Group(rows, _joined(caches) if caches else self._new_cache()))

    def _state_of(self, token_ids: tuple[int, ...]) -> DynamicCache:
        """The cache behind a prefix, which is computed from the longest part that is kept."""
        found, cache = self._states.find(token_ids)
        if len(found) < len(token_ids):
            cache = self._new_cache() if cache is None else _forked(cache, [0])
            self._forward(torch.tensor([token_ids[len(found) :]]), cache, start=len(found))
            self.num_prefilled_tokens += len(token_ids) - len(found)
            self._states.keep(token_ids, cache)
        assert cache is not None, "a prefix has a token"
        return cache

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())

    # Decoding

    def _forward(self, input_ids: torch.Tensor, cache: DynamicCache, start: int) -> torch.Tensor:
        """Run the model on (rows, queries) tokens from position `start` on; last logits (rows, vocab) in float32."""
        device = self.model.device
        inputs: dict[str, Any] = {self._cache_argument: cache}
        if self._takes_positions:  # some models would count from 0 again
            positions = torch.arange(start, start + input_ids.size(1), device=device)
            inputs["position_ids"] = positions.expand(input_ids.shape)
        outputs = self.model(input_ids=input_ids.to(device), use_cache=True, logits_to_keep=1, **inputs)
        return outputs.logits[:, -1].float()

    def _step(self, group: _Group) -> list[SegmentResult]:
        """One token for every row of a group; results of the rows that are done."""
        next_inputs = torch.tensor([[row.next_input] for row in group.rows])
        logits = self._forward(next_inputs, group.cache, start=group.rows[0].position)
        if not self._has_compared:
            compare_with_plain_forward(self.model, group.rows[0].path, logits[0])
            self._has_compared = group.rows[0].position > 0  # a first token has no state before it
        results, running = [], []
        for slot, result in enumerate(self._draw_next(group.rows, logits)):
            if result is None:
                running.append(slot)
                continue
            results.append(result)
            if result.finish_reason == "length":  # everything but the last token, which was never fed
                self._states.keep(tuple(group.rows[slot].path[:-1]), _forked(group.cache, [slot]))
        if not running:
            self._groups.remove(group)
        elif results:
            group.rows, group.cache = [group.rows[slot] for slot in running], _forked(group.cache, running)
        return results


class _States:
    """Caches of single paths by their tokens, with those used longest ago dropped when they are too large."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], DynamicCache] = OrderedDict()
        self._num_bytes = 0

    def find(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], DynamicCache | None]:
        """The longest kept beginning of `token_ids` and its cache; empty and `None` if there is none."""
        found = token_ids if token_ids in self._kept else ()
        if not found:
            starts = (key for key in self._kept if token_ids[: len(key)] == key)
            found = max(starts, key=len, default=())
        if not found:
            return (), None
        self._kept.move_to_end(found)
        return found, self._kept[found]

    def keep(self, token_ids: tuple[int, ...], cache: DynamicCache) -> None:
        if token_ids in self._kept:
            return
        self._kept[token_ids] = cache
        self._num_bytes += _num_bytes(cache)
        while self._num_bytes > self._max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= _num_bytes(dropped)


# Caches of transformers: what their layers hold are tensors with rows first, and dicts of such tensors.


def _tensors(layer: object) -> Iterator[tuple[str, object, torch.Tensor]]:
    """Name, key in a dict (`None` outside of one) and value of each tensor that a layer of a cache holds."""
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            yield name, None, value
        elif isinstance(value, dict):
            yield from ((name, key, part) for key, part in value.items() if isinstance(part, torch.Tensor))


def _with_rows(cache: DynamicCache, change: Callable[[int, str, object, torch.Tensor], torch.Tensor]) -> DynamicCache:
    """A copy of a cache with each tensor changed: `change(layer index, name, key, tensor)`."""
    result = copy.copy(cache)
    result.layers = []
    for i, layer in enumerate(cache.layers):
        own = copy.copy(layer)
        states = vars(own)
        states.update({name: dict(value) for name, value in states.items() if isinstance(value, dict)})
        for name, key, tensor in _tensors(layer):
            changed = change(i, name, key, tensor) if tensor.dim() > 1 else tensor
            if key is None:
                states[name] = changed
            else:
                states[name][key] = changed
        result.layers.append(own)
    return result


def _forked(cache: DynamicCache, rows: list[int]) -> DynamicCache:
    """A cache with copies of these rows of another one, which later forwards leave as it is."""
    index: dict[torch.device, torch.Tensor] = {}

    def select(_layer: int, _name: str, _key: object, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device not in index:
            index[tensor.device] = torch.tensor(rows, device=tensor.device)
        return tensor.index_select(0, index[tensor.device])

    return _with_rows(cache, select)


def _joined(caches: list[DynamicCache]) -> DynamicCache:
    """One cache with copies of the rows of several, all of the same length."""
    held = [
        [{(name, key): tensor for name, key, tensor in _tensors(layer)} for layer in each.layers] for each in caches
    ]

    def join(layer: int, name: str, key: object, _tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([each[layer][name, key] for each in held])

    return _with_rows(caches[0], join)


def _num_bytes(cache: DynamicCache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for _, _, tensor in _tensors(layer))
