"""Do packed rows give what plain rows give, forward and backward, with each kernel that may be used?"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from treepo_trl.model_support import layer_heads, layer_reaches
from treepo_trl.update.packable import why_no_trees, why_not_packable
from treepo_trl.update.packed_forward import model_inputs
from treepo_trl.update.packing import PackedRows, pack_rows

from .engine_errors import unread_model
from .findings import BrokenError, CannotRunError, in_words, last_line
from .needs import Needs
from .number_type import training_device


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NUM_ROWS, _PROMPT, _SHARED, _OWN = 4, 16, 24, 32
"""Rows, and tokens of their prompt, of the segment that they share and of their own."""
_BOUNDS = {torch.float32: (1e-3, 1e-3), torch.float16: (0.05, 0.05), torch.bfloat16: (0.1, 0.1)}
"""Mean difference of log-probabilities in nats, and relative difference of gradients, that rounding explains."""


def check_packed(needs: Needs, backend: Literal["sdpa", "flex"]) -> str:
    """Compare log-probabilities and gradients of four rows that share prefixes, packed with `backend` and plain."""
    try:
        return _compared(needs, backend)
    except torch.OutOfMemoryError as error:
        raise CannotRunError(f"{needs.model} is too large to be compared here: {last_line(str(error))}") from error
    except OSError as error:
        unread = unread_model(error, needs.model)
        if unread is None:
            raise
        raise unread from error


def _compared(needs: Needs, backend: Literal["sdpa", "flex"]) -> str:
    """What was seen; `BrokenError` if packed rows differ by more than rounding."""
    device = training_device(needs)
    if backend == "flex" and device.type != "cuda":
        raise CannotRunError("FlexAttention has no backward pass on a processor")
    dtype = _dtype(needs, device)
    model = _load(needs, device, dtype)
    text = model.config.get_text_config()
    reason = why_not_packable(text) or why_no_trees(model)
    if reason is not None:
        raise CannotRunError(f"this model trains on plain rows: {reason}")
    if backend == "flex" and text._attn_implementation == "eager":
        raise CannotRunError("this model has eager attention, which takes no kernel")
    _train_outer_layers(model)
    ids, mask = _rows(text.vocab_size, device)
    packed = pack_rows(ids, mask, _SHARED + _OWN)
    plain_logps, plain_gradient = _with_gradient(model, lambda: _plain_logps(model, ids))
    try:
        logps, gradient = _with_gradient(model, lambda: _packed_logps(model, packed, backend, dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's, the compiler's or CUDA's own
        _refuse(needs, backend, in_words(error))
        raise
    difference = (logps - plain_logps).abs().mean().item()
    relative = ((gradient - plain_gradient).norm() / plain_gradient.norm()).item()
    place = f"{str(dtype).removeprefix('torch.')}, {device.type}"
    seen = f"{difference:.1e} nats and {relative:.1e} of the gradient from plain rows ({place})"
    bounds = _BOUNDS[dtype]
    if not (difference <= bounds[0] and relative <= bounds[1]):
        _refuse(needs, backend, f"{seen}, where rounding explains {bounds[0]} and {bounds[1]}")
    sizes = sorted({size for heads in layer_heads(text) for size in (heads.size, heads.value_size)})
    return f"{seen}; heads of {' and '.join(map(str, sizes))} dimensions"


def _refuse(needs: Needs, backend: str, cause: str) -> None:
    """Raise: the kernel is broken if a recipe names it or there is no other, else it is only not to be had."""
    if backend == "flex" and needs.training.get("tree_packing") != "flex":
        raise CannotRunError(f"FlexAttention does not work here ({cause}); set `tree_packing: sdpa` for long rows")
    remedy = "Set `tree_packing: sdpa`." if backend == "flex" else "Set `tree_packing: 'off'`, and report it."
    raise BrokenError(f"Packed rows with `{backend}`: {cause}.", remedy)


def _dtype(needs: Needs, device: torch.device) -> torch.dtype:
    """The type of the training on a card, where kernels depend on it; float32 on a processor, which is exact."""
    if device.type == "cpu":
        return torch.float32
    if needs.number_type is not None:
        return getattr(torch, needs.number_type)
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def _load(needs: Needs, device: torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    # With the attention that transformers chooses: SDPA, or eager for a model that has no other.
    model: Any = AutoModelForCausalLM.from_pretrained(needs.model, dtype=dtype)
    return cast("PreTrainedModel", model.to(device).eval())  # dropout would make the two differ


def _train_outer_layers(model: "PreTrainedModel") -> None:
    """Gradients for the first and the last layer only: they have passed through all, and take little memory."""
    model.requires_grad_(False)
    count = model.config.get_text_config().num_hidden_layers
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count)
    for layer in (layers[0], layers[-1]):
        layer.requires_grad_(True)


def _rows(vocab_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of equal length that share the prompt, by twos a segment too."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(vocab_size, shape, generator=generator)

    prompt, shared = draw(1, _PROMPT).expand(_NUM_ROWS, -1), draw(2, _SHARED).repeat_interleave(_NUM_ROWS // 2, 0)
    ids = torch.cat([prompt, shared, draw(_NUM_ROWS, _OWN)], 1).to(device)
    return ids, torch.ones_like(ids)


def _plain_logps(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, _PROMPT - 1 : -1]
    return _logps(logits, ids[:, _PROMPT:])


def _packed_logps(
    model: "PreTrainedModel", packed: PackedRows, backend: Literal["sdpa", "flex"], dtype: torch.dtype
) -> torch.Tensor:
    text = model.config.get_text_config()
    inputs = model_inputs(packed, str(text._attn_implementation), dtype, backend, layer_reaches(text))
    labels = inputs.pop("shift_labels")
    assert isinstance(labels, torch.Tensor), "one label per packed position"
    logits = model(**inputs, use_cache=False).logits
    return packed.unpack(_logps(logits, labels.clamp(min=0)))


def _logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _with_gradient(model: "PreTrainedModel", forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the gradient of their sum with alternating signs, as a vector on the CPU."""
    logps = forward()
    signs = 1 - 2 * (torch.arange(logps.numel(), device=logps.device).view_as(logps) % 2)
    (logps * signs).sum().backward()
    gradient = torch.cat([p.grad.flatten().cpu().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return logps.detach(), gradient
