"""
What forward and backward pass of an update keep in memory at most, without a GPU.

The update runs on the meta device, where tensors have shapes but no memory.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from treepo_trl.policy.four_bit_base import base_of


if TYPE_CHECKING:
    from peft import PeftModel


STAND_IN = "treepo_plan"
"""Attention, by its name in transformers, whose memory is linear in the row, as that of fused kernels."""


def register_stand_in() -> None:
    """Let transformers find the attention by its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(STAND_IN, _attend)


def activation_bytes(model: "PreTrainedModel | PeftModel", num_tokens: int, checkpointing: bool) -> int:
    """
    Peak of what forward and backward pass of one row of `num_tokens` add to weights and gradients.

    The model lies on the meta device, with the attention that `register_stand_in` registers.
    """
    base = model if isinstance(model, PreTrainedModel) else base_of(model)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    known = [t for p in model.parameters() for t in (p, p.grad) if t is not None] + list(model.buffers())
    peak = PeakBytes(known)
    with torch.device("meta"), peak:
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        hidden = base.get_decoder()(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
        hidden.float().sum().backward()  # the fused LM head of TRL holds a few rows of logits at a time
    return peak.peak


class PeakBytes(TorchDispatchMode):
    """Bytes of all storages that operations make, at their largest; storages of `known` tensors do not count."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


class _LinearAttention(torch.autograd.Function):
    """Shapes and memory of fused attention: it keeps its inputs, its output and a number per row and head."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: BackwardCFunction, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = cast(tuple[torch.Tensor, ...], ctx.saved_tensors)[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    output = cast(torch.Tensor, _LinearAttention.apply(query, key, value))
    return output.transpose(1, 2).contiguous(), None
