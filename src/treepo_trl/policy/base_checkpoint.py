"""
The base model that a vLLM engine serves a QLoRA policy on.

The engine must compute the function that the policy computes: the base model after quantization, not the checkpoint
before it. So it loads the policy's own 4-bit weights, from a temporary checkpoint: as they are, or written out as the
numbers that they stand for, which is the same function at 16 bits' speed.
"""

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from treepo_trl.treepo_config import BaseWeights


# Of what vLLM may take, the part for the weights of a dequantized base that `auto` accepts; the rest is for the cache.
_LARGEST_SHARE = 0.75


def is_4bit(model: Any) -> bool:
    """Whether the base of a PEFT model has 4-bit linear layers of bitsandbytes."""
    return bool(getattr(model.get_base_model(), "is_loaded_in_4bit", False))


def choose_base_weights(
    base_weights: BaseWeights,
    model: Any,
    device: torch.device,
    gpu_memory_utilization: float,
    tensor_parallel_size: int = 1,
    share: bool = False,
) -> Literal["quantized", "dequantized"]:
    """
    How the engine gets the base of a 4-bit PEFT model.

    `auto` is `"dequantized"` where the engine cannot hold these 4-bit weights, on a processor, and where the larger
    weights leave a quarter of the engine's memory to its cache. With `share` policy and engine have the same weights,
    so it is `"quantized"`.

    Raises:
        ValueError: for `"quantized"` where the engine cannot hold the policy's 4-bit weights, with the reason.
    """
    reason = _why_not_quantized(model.get_base_model(), tensor_parallel_size)
    if share:
        if reason is not None:
            raise ValueError(
                f"`vllm_share_base_weights=True` needs the policy's 4-bit weights in the engine, but {reason}. Unset "
                "it."
            )
        return "quantized"
    if base_weights == "auto":
        if reason is not None or device.type != "cuda":
            return "dequantized"
        room = gpu_memory_utilization * torch.cuda.get_device_properties(device).total_memory
        return by_size(dequantized_size(model), room)
    if base_weights == "quantized" and reason is not None:
        raise ValueError(
            f"`vllm_base_weights` is 'quantized', but {reason}. Set `vllm_base_weights='dequantized'`, which needs "
            f"{dequantized_size(model) / 2**30:.1f} GiB for the engine's weights."
        )
    return base_weights


def by_size(dequantized: float, room: float) -> Literal["quantized", "dequantized"]:
    """What `auto` takes for a base of `dequantized` bytes in an engine that may take `room`, if it can choose."""
    return "dequantized" if dequantized <= _LARGEST_SHARE * room else "quantized"


def linear_layers(base: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Names and linear layers that bitsandbytes quantizes by default: all of the base but the output head."""
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name:
            yield name, module


def dequantized_size(model: Any) -> int:
    """Bytes of the base of a PEFT model in the engine: in 16 bits, to which vLLM rounds float32 checkpoints too."""
    return 2 * model.get_base_model().num_parameters()


def _why_not_quantized(base: Any, tensor_parallel_size: int) -> str | None:
    """Why vLLM cannot hold the policy's own 4-bit weights; nothing if it can."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if "bitsandbytes" not in QUANTIZATION_METHODS:
        return "this vLLM has no bitsandbytes layers (from 0.28 on: `pip install vllm-bnb-plugin`)"
    if tensor_parallel_size > 1:
        return "with tensor parallelism vLLM cannot split weights that are quantized already"
    left_out = _weights_left_out(base)
    if left_out:
        return f"vLLM needs all linear layers and experts in 4 bits, and the policy has {left_out} in full precision"
    if type(getattr(base.get_output_embeddings(), "weight", None)).__name__ == "Params4bit":
        return "the policy's output head is in 4 bits, which vLLM has in full precision"
    for name, parameter in base.named_parameters():
        if type(parameter).__name__ == "Params4bit" and parameter.dtype != torch.uint8:
            return f"vLLM's 4-bit weights are stored as uint8, and the policy's as {parameter.dtype} ({name})"
    return None


def _weights_left_out(base: Any) -> str | None:
    """Name of a weight that would have to be in 4 bits in vLLM and is not in the policy."""
    for name, module in linear_layers(base):
        if type(module) is torch.nn.Linear:  # not a 4-bit layer, which is one too
            return name.replace(".base_layer", "")
    for name, parameter in base.named_parameters():
        if parameter.dim() > 2:  # experts in one tensor
            return name
    return None


def base_state_dict(model: Any, base_weights: Literal["quantized", "dequantized"]) -> dict[str, torch.Tensor]:
    """
    Weights of the base of a 4-bit PEFT model on the CPU, without any adapter.

    Names are those of the base model's checkpoint; a tied weight comes once, under its first name. `"dequantized"`
    has 4-bit weights as the numbers they stand for, `"quantized"` as they are, with the entries for their scales.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # loads bitsandbytes

    # Not `named_parameters`: bitsandbytes brings weights that a CPU forward has re-packed back for `state_dict`.
    entries = model.get_base_model().state_dict(keep_vars=True)
    quantized = {name for name, value in entries.items() if type(value).__name__ == "Params4bit"}
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in entries.items():
        weight_name = name[: name.find(".weight.") + len(".weight")]  # of a scale such as `...weight.absmax`
        is_scale = name not in quantized and weight_name in quantized
        if model.prefix in name or id(value) in seen or (is_scale and base_weights == "dequantized"):
            continue
        seen.add(id(value))
        dequantize = name in quantized and base_weights == "dequantized"
        weight = dequantize_bnb_weight(value) if dequantize else value
        state[name.replace(".base_layer.", ".")] = weight.detach().cpu()
    return state


@contextmanager
def base_checkpoint(model: Any, base_weights: Literal["quantized", "dequantized"]) -> Iterator[str]:
    """
    Folder with the base of a 4-bit PEFT model as a checkpoint; gone after the block.

    It lies in the folder for temporary files (`TMPDIR`). While it is written, the weights are in CPU memory too.
    `"dequantized"` is a plain checkpoint in the policy's precision, `"quantized"` one that is in 4 bits already.

    Raises:
        OSError: if the disk has no room for it.
    """
    base = model.get_base_model()
    state = base_state_dict(model, base_weights)
    config = copy.deepcopy(base.config)
    if base_weights == "dequantized":
        del config.quantization_config
    folder = tempfile.mkdtemp(prefix="treepo-base-")
    try:
        needed, free = sum(weight.nbytes for weight in state.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"The {base_weights} base model takes {needed / 2**30:.1f} GiB while the engine loads it, and "
                f"{folder} has {free / 2**30:.1f} GiB free. Point the environment variable TMPDIR to a larger disk."
            )
        with torch.device("meta"):
            skeleton = type(base)(config).to(base.dtype)
        skeleton.generation_config = base.generation_config
        skeleton.save_pretrained(folder, state_dict=state)
        del state, skeleton  # the engine may need their memory
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
