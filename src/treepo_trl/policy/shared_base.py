"""
The policy's frozen weights against those of the vLLM engine: whether they are the same, and one copy of them for both.

vLLM joins some layers (query, key and value; gate and up) by stacking their rows, so each of the policy's weights is a
slice of one of the engine's. A slice takes a weight's place only if it holds the same numbers, bit for bit: whatever
else an engine does to its weights costs memory and never changes the policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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

    From then on neither may change them in place: merging an adapter into the base would change the engine too. To
    call it again is cheap, and takes back what has been copied since, as `Module.to` does.

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
    Names of frozen weights that hold other numbers in the engine, up to its rounding, in whatever order.

    What cannot be compared is left out: weights that the engine has packed, in another number of bits, or under a name
    that is not found, and 16-bit weights of two types.
    """
    frozen = _frozen_weights(base)
    return [name for name, held in _slices(engine_model, frozen) if not _same_numbers(frozen[name], held)]


def _frozen_weights(base: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Frozen weights of the base by their names without an adapter; of adapters none, which may be frozen too."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if not parameter.requires_grad and parameter.dim() > 0 and ".lora_" not in name
    }


def _slices(engine_model: Any, frozen: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
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
                break  # where the next part would begin is not known either
            rows = len(frozen[name])
            yield name, weight.data[start : start + rows]  # an embedding of the engine may have more rows
            start += rows


def _names_in_engine(engine_model: Any, frozen: dict[str, torch.nn.Parameter]) -> dict[str, str]:
    """The policy's names by those that vLLM gives the same layers; it renames those of some architectures."""
    mapper = getattr(engine_model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {name: name for name in frozen}
    if hasattr(mapper, "get_rename_mapper"):  # without the joining of layers, from vLLM 0.31 on in the same mapper
        mapper = mapper.get_rename_mapper()
    renamed = {new: name for name in frozen for new in mapper.apply_list([name])}
    # A weight with another name of its own is another weight: of `A_log` for example vLLM has the exponential.
    return {new: name for new, name in renamed.items() if new.rpartition(".")[2] == name.rpartition(".")[2]}


def _interchangeable(weight: torch.Tensor, held: torch.Tensor) -> bool:
    return (
        (weight.shape, weight.dtype, weight.stride()) == (held.shape, held.dtype, held.stride())
        and not held.is_inference()  # which no backward pass can use
        and torch.equal(weight.data.to(held.device), held)
    )


def _same_numbers(weight: torch.Tensor, held: torch.Tensor) -> bool:
    if weight.is_meta or hasattr(weight, "quant_state") or weight.data_ptr() == held.data_ptr():
        return True
    comparable = held.is_floating_point() and held.itemsize >= 2 and weight.dtype in (held.dtype, torch.float32)
    if not comparable:
        return True
    if weight.shape != held.shape:  # fewer rows are another embedding; else it is packed or transposed
        return held.numel() == 0 or weight.shape[1:] != held.shape[1:]
    rounded = weight.data.to(held)
    if torch.equal(rounded, held):
        return True
    # In another order: sum and norm are the same up to float64's rounding, and sorting would take much memory.
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in (rounded, held)]
    sums = [each.sum(dtype=torch.float64) for each in (rounded, held)]
    largest = max(abs(norms[0] - norms[1]), abs(sums[0] - sums[1]))
    return bool(largest <= 1e-9 * norms[0])
