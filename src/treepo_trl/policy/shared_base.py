"""
The policy's frozen weights and the vLLM engine's: whether they are the same, and one copy of them for both.

vLLM joins some layers (query, key and value; gate and up) by stacking their rows. So each of the policy's weights is a
slice of one of the engine's. A slice takes a weight's place only if it holds the same numbers, bit for bit. What an
engine has changed otherwise stays twice in memory, and the policy computes as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType

from .four_bit_base import base_of, is_4bit, why_not_quantized


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_sharing(model: "PeftModel", accelerator: Accelerator, tensor_parallel_size: int) -> None:
    """
    Raise unless this policy can compute with an engine's copy of its frozen base.

    Raises:
        ValueError: if the policy's weights are split over processes or devices, or if vLLM cannot hold its 4-bit
            weights; with what to do instead.
    """
    sharding = accelerator.distributed_type
    if sharding in SHARDED:
        raise ValueError(
            f"`vllm_share_base_weights=True`, but {sharding.value} splits the policy's weights over processes, "
            "and the engine holds whole ones. Unset it, or train without sharding."
        )
    base = base_of(model)
    places = sorted(map(str, set(getattr(base, "hf_device_map", {}).values())))
    if len(places) > 1:
        advice = "let the process see one GPU (`CUDA_VISIBLE_DEVICES=0`)"
        if {"cpu", "disk"} & set(places):
            advice = "load the policy in 4 bits (`load_in_4bit`): it does not fit the GPU"
        raise ValueError(
            f"`vllm_share_base_weights=True`, but the policy is spread over {', '.join(places)} and the engine is "
            f"on one device. Unset it, or {advice}."
        )
    reason = why_not_quantized(base, tensor_parallel_size) if is_4bit(model) else None
    if reason is not None:
        raise ValueError(
            f"`vllm_share_base_weights=True` needs the policy's 4-bit weights in the engine, but {reason}. Unset it."
        )


def report_sharing(shared: int, own: dict[str, int], policy_dtype: torch.dtype, engine_dtype: torch.dtype) -> None:
    """
    Log how much of the base policy and engine share; a warning if it is less than nine tenths.

    Args:
        shared (`int`), own (`dict[str, int]`):
            What [`share_weights`] returns.
        policy_dtype (`torch.dtype`), engine_dtype (`torch.dtype`):
            Precisions of the two models.

    Raises:
        ValueError: if they share nothing.
    """
    policy, engine = (str(dtype).removeprefix("torch.") for dtype in (policy_dtype, engine_dtype))
    if not shared:
        raise ValueError(
            f"`vllm_share_base_weights=True`, but no weight of the engine ({engine}) was found equal to the "
            f"policy's ({policy}). Load the policy in the engine's precision "
            f'(`model_init_kwargs={{"dtype": "{engine}"}}`, `--dtype {engine}`). If it is, vLLM arranges this '
            "model's weights otherwise: unset it."
        )
    kept = sum(own.values())
    message = f"Policy and engine share {shared / 2**30:.2f} GiB of the base."
    if kept <= 0.1 * (shared + kept):
        logger.info(message)
        return
    largest = sorted(own, key=lambda name: -own[name])[:3]
    logger.warning(
        f"{message} {kept / 2**30:.2f} GiB are held twice, {', '.join(largest)} for example: their numbers or "
        f"their precision (policy {policy}, engine {engine}) differ, or vLLM arranges them otherwise."
    )


@contextmanager
def parked(base: torch.nn.Module) -> Iterator[None]:
    """
    Keep the frozen weights of a model in the processor's memory for a block, to build an engine in their place.

    Afterwards they are back on their devices, unless they were replaced there.
    """
    devices = [(p, p.device) for p in base.parameters() if not p.requires_grad]
    try:
        for parameter, _ in devices:
            parameter.data = parameter.data.cpu()
        yield
    finally:
        for parameter, device in devices:
            parameter.data = parameter.data.to(device)


def share_weights(
    base: torch.nn.Module, engine_model: torch.nn.Module, device: torch.device
) -> tuple[int, dict[str, int]]:
    """
    Let the frozen weights of `base` be views of the engine's, where both are equal.

    From then on neither may change them in place: merging an adapter into the base would change the engine too. A
    second call is cheap. It shares again what has been copied since, as `Module.to` copies weights.

    Args:
        base (`torch.nn.Module`):
            The policy without its adapter's wrapper, on `device` or [`parked`].
        engine_model (`torch.nn.Module`):
            The model in the vLLM engine, with LoRA layers or without.
        device (`torch.device`):
            Where the policy computes. Weights that the engine has elsewhere are not shared.

    Returns:
        Bytes of the base that the engine holds for both, and the frozen weights that the policy still holds itself,
        by name, with their bytes.
    """
    frozen = _frozen_weights(base)
    own = {name: weight.nbytes for name, weight in frozen.items()}
    shared = 0
    for name, held in _slices(engine_model, frozen):
        weight = frozen[name]
        if name not in own:
            continue
        if weight.data_ptr() != held.data_ptr():
            if held.device.type != device.type or not _interchangeable(weight, held):
                continue
            weight.data = held
        shared += own.pop(name)
    return shared, own


def different_weights(base: torch.nn.Module, engine_model: torch.nn.Module) -> list[str]:
    """
    Names of frozen weights that hold other numbers in the engine.

    Rounding to the engine's precision is allowed, and so is any order of the numbers. What cannot be compared is left
    out: weights that the engine has packed, weights of another number of bits, weights whose name is not found, and
    16-bit weights of two types.
    """
    frozen = _frozen_weights(base)
    return [name for name, held in _slices(engine_model, frozen) if not _same_numbers(frozen[name], held)]


def _frozen_weights(base: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Frozen weights of the base by their names without an adapter. Adapters are left out: they may be frozen too."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if not parameter.requires_grad and parameter.dim() > 0 and ".lora_" not in name
    }


def _slices(
    engine_model: torch.nn.Module, frozen: dict[str, torch.nn.Parameter]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of the policy's weights with the part of an engine's weight that should be the same."""
    packed: dict[str, list[str]] = getattr(engine_model, "packed_modules_mapping", {})
    names = _names_in_engine(engine_model, frozen)
    for engine_name, weight in engine_model.named_parameters():
        path = engine_name.replace(".base_layer.", ".").split(".")
        parts = packed.get(path[-2], [path[-2]]) if len(path) > 1 else []
        start = 0
        for part in parts:
            name = names.get(".".join([*path[:-2], part, path[-1]]))
            if name is None:
                break  # the next part's first row is not known either
            rows = len(frozen[name])
            yield name, weight.data[start : start + rows]  # an embedding of the engine may have more rows
            start += rows


def _names_in_engine(engine_model: torch.nn.Module, frozen: dict[str, torch.nn.Parameter]) -> dict[str, str]:
    """The policy's names of weights by the engine's. vLLM renames the layers of some architectures."""
    mapper = getattr(engine_model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {name: name for name in frozen}
    if hasattr(mapper, "get_rename_mapper"):  # from vLLM 0.31 on the whole mapper joins layers too
        mapper = mapper.get_rename_mapper()
    rename = cast(Callable[[list[str]], list[str]], mapper.apply_list)
    renamed = {new: name for name in frozen for new in rename([name])}
    # A new last part means another weight: vLLM holds the exponential of `A_log` as `A`.
    return {new: name for new, name in renamed.items() if new.rpartition(".")[2] == name.rpartition(".")[2]}


def _interchangeable(weight: torch.Tensor, held: torch.Tensor) -> bool:
    return (
        (weight.shape, weight.dtype, weight.stride()) == (held.shape, held.dtype, held.stride())
        and not held.is_inference()  # no backward pass can use inference tensors
        and torch.equal(weight.data.to(held.device), held)
    )


def _same_numbers(weight: torch.Tensor, held: torch.Tensor) -> bool:
    if weight.is_meta or hasattr(weight, "quant_state") or weight.data_ptr() == held.data_ptr():
        return True
    comparable = held.is_floating_point() and held.itemsize >= 2 and weight.dtype in (held.dtype, torch.float32)
    if not comparable:
        return True
    if weight.shape != held.shape:  # another number of rows is another embedding; else it is packed or transposed
        return held.numel() == 0 or weight.shape[1:] != held.shape[1:]
    rounded = weight.data.to(held)
    if torch.equal(rounded, held):
        return True
    # The same numbers in another order have the same sum and norm up to float64's rounding. Sorting takes much memory.
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in (rounded, held)]
    sums = [each.sum(dtype=torch.float64) for each in (rounded, held)]
    largest = max(abs(norms[0] - norms[1]), abs(sums[0] - sums[1]))
    return bool(largest <= 1e-9 * norms[0])
