"""
The base model that a vLLM engine serves a QLoRA policy on.

The engine must compute what the policy computes: the base model after quantization, not the checkpoint before it. So
it loads the policy's own 4-bit weights from a temporary checkpoint. They are written as they are, or as the numbers
that they stand for. The second computes the same function, with layers in 16 bits, which are faster.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from treepo_trl.treepo_config import BaseWeights

from .temporary_folder import TemporaryFolder


if TYPE_CHECKING:
    from peft import PeftModel


QUANTIZATION_FILE = "base_quantization.json"
"""Beside an adapter: how its base was quantized in training, which PEFT does not save."""

_LARGEST_SHARE = 0.75
"""Part of vLLM's memory that `auto` gives to the weights of a dequantized base. The rest is for the cache."""


def base_of(model: "PeftModel") -> PreTrainedModel:
    """The model that a PEFT model wraps, its layers with adapters."""
    return cast(PreTrainedModel, model.get_base_model())


def is_4bit(model: "PeftModel") -> bool:
    """Whether the base of a PEFT model has 4-bit linear layers of bitsandbytes."""
    return bool(getattr(base_of(model), "is_loaded_in_4bit", False))


@dataclass(frozen=True)
class BaseQuantization:
    """What decides the numbers that 4-bit weights stand for."""

    quant_type: str = "nf4"
    double: bool = False
    dtype: str = "auto"
    """Precision of the weights that are not in 4 bits, and of what is computed."""

    def config(self) -> BitsAndBytesConfig:
        """As transformers takes it."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=None if self.dtype == "auto" else getattr(torch, self.dtype),
        )


def write_quantization(model: torch.nn.Module, folder: str | Path) -> None:
    """Write how the base of a 4-bit PEFT model is quantized beside its adapter; nothing for other models."""
    if not hasattr(model, "peft_config") or not is_4bit(cast("PeftModel", model)):
        return
    base = base_of(cast("PeftModel", model))
    config = cast(BitsAndBytesConfig, base.config.quantization_config)
    dtype = str(base.dtype).removeprefix("torch.")
    record = BaseQuantization(config.bnb_4bit_quant_type, bool(config.bnb_4bit_use_double_quant), dtype)
    Path(folder, QUANTIZATION_FILE).write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")


def read_quantization(folder: str | Path) -> BaseQuantization | None:
    """
    What [`write_quantization`] has written there; `None` if it has not.

    Raises:
        ValueError: if the file cannot be read.
    """
    path = Path(folder, QUANTIZATION_FILE)
    if not path.is_file():
        return None
    try:
        return BaseQuantization(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"`{path}` cannot be read: {error}. Remove it, and give `--load_in_4bit`.") from error


def choose_base_weights(
    base_weights: BaseWeights,
    model: "PeftModel",
    device: torch.device,
    gpu_memory_utilization: float,
    tensor_parallel_size: int = 1,
) -> Literal["quantized", "dequantized"]:
    """
    How the engine gets the base of a 4-bit PEFT model.

    `auto` is `"dequantized"` where the engine cannot hold these 4-bit weights, on a processor, and where the larger
    weights leave a quarter of the engine's memory to its cache. Else it is `"quantized"`.

    Raises:
        ValueError: for `"quantized"` where the engine cannot hold the policy's 4-bit weights, with the reason.
    """
    reason = why_not_quantized(base_of(model), tensor_parallel_size)
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
    """What `auto` chooses for a base of `dequantized` bytes in 16 bits and an engine that may use `room` bytes."""
    return "dequantized" if dequantized <= _LARGEST_SHARE * room else "quantized"


def linear_layers(base: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Names and linear layers that bitsandbytes quantizes by default: all of the base but the output head."""
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name:
            yield name, module


def dequantized_size(model: "PeftModel") -> int:
    """Bytes of the base of a PEFT model in 16 bits. vLLM rounds float32 checkpoints to 16 bits too."""
    return 2 * base_of(model).num_parameters()


def why_not_quantized(base: PreTrainedModel, tensor_parallel_size: int) -> str | None:
    """Why vLLM cannot hold the policy's own 4-bit weights; `None` if it can."""
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


def _weights_left_out(base: PreTrainedModel) -> str | None:
    """Name of a weight that would have to be in 4 bits in vLLM and is not in the policy."""
    for name, module in linear_layers(base):
        if type(module) is torch.nn.Linear:  # 4-bit layers are a subclass
            return name.replace(".base_layer", "")
    for name, parameter in base.named_parameters():
        if parameter.dim() > 2:  # experts in one tensor
            return name
    return None


def base_state_dict(model: "PeftModel", base_weights: Literal["quantized", "dequantized"]) -> dict[str, torch.Tensor]:
    """
    Weights of the base of a 4-bit PEFT model on the CPU, without any adapter.

    Names are those of the base model's checkpoint. A tied weight comes once, under its first name. `"dequantized"`
    gives 4-bit weights as the numbers that they stand for. `"quantized"` gives them as they are, with the entries for
    their scales.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # loads bitsandbytes

    # A CPU forward packs weights in another way. For `state_dict`, not for `named_parameters`, bitsandbytes undoes it.
    entries = base_of(model).state_dict(keep_vars=True)
    adapter_prefix = str(model.prefix)
    quantized = {name for name, value in entries.items() if type(value).__name__ == "Params4bit"}
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in entries.items():
        weight_name = name[: name.find(".weight.") + len(".weight")]  # of a scale such as `...weight.absmax`
        is_scale = name not in quantized and weight_name in quantized
        if adapter_prefix in name or id(value) in seen or (is_scale and base_weights == "dequantized"):
            continue
        seen.add(id(value))
        dequantize = name in quantized and base_weights == "dequantized"
        weight = dequantize_bnb_weight(value) if dequantize else value
        state[name.replace(".base_layer.", ".")] = weight.detach().cpu()
    return state


@contextmanager
def base_checkpoint(model: "PeftModel", base_weights: Literal["quantized", "dequantized"]) -> Iterator[str]:
    """
    Folder with the base of a 4-bit PEFT model as a checkpoint, deleted after the block.

    It lies in the folder for temporary files (`TMPDIR`). While it is written, the weights are in CPU memory too.
    `"dequantized"` is a plain checkpoint in the policy's precision. `"quantized"` is a checkpoint in 4 bits.

    Raises:
        OSError: if the disk has no room for it.
    """
    base = base_of(model)
    state = base_state_dict(model, base_weights)
    config = copy.deepcopy(base.config)
    if base_weights == "dequantized":
        delattr(config, "quantization_config")
    owned = TemporaryFolder("base", tempfile.gettempdir())
    folder = owned.path
    try:
        needed, free = sum(weight.nbytes for weight in state.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"The {base_weights} base model takes {needed / 2**30:.1f} GiB while the engine loads it, and "
                f"{folder} has {free / 2**30:.1f} GiB free. Point the environment variable TMPDIR to a larger disk."
            )
        with torch.device("meta"):
            skeleton = type(base)(config)
            cast(torch.nn.Module, skeleton).to(base.dtype)
        skeleton.generation_config = base.generation_config
        skeleton.save_pretrained(folder, state_dict=state)
        del state, skeleton  # the engine may need their memory
        yield folder
    finally:
        owned.remove()
