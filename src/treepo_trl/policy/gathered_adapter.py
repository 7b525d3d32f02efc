"""
A policy's LoRA adapter in whole tensors, and its folder as engines load it, also where processes share the weights.

FSDP2 and DeepSpeed's ZeRO-3 leave each process a part of each weight. PEFT's `save_pretrained` asks for the memory of
whole ones: it fails on the parts of FSDP2, and writes empty tensors of ZeRO-3.
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend


if TYPE_CHECKING:
    from peft import PeftModel


_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # in names, of activation checkpointing and torch.compile


def adapter_parameters(model: "PeftModel") -> dict[str, torch.nn.Parameter]:
    """Parameters of the active adapter by name, as each process has them."""
    adapter = cast(str, model.active_adapter)
    # The factors of an embedding are parameters themselves, those of other layers have some: `.weight` follows.
    return {n: p for n, p in model.named_parameters() if ".lora_" in n and adapter in n.split(".")}


def num_bytes(model: "PeftModel") -> int:
    """Size of the whole active adapter; a parameter of ZeRO-3 that is not gathered says itself that it is empty."""
    return bytes_of(adapter_parameters(model).values())


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    """Size of whole parameters, also of those that ZeRO-3 has not gathered."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)


def gathered_adapter(model: "PeftModel", accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """
    The active adapter's weights on the processor, whole, by their names in the model.

    All processes call it together: each gets every weight, and may leave it to one of them to write.

    Args:
        model ([`~peft.PeftModel`]):
            The policy without the wrapper of a distributed training.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the weights are shared. Those of FSDP2 that wait on the processor are gathered on its device.
    """
    weights: dict[str, torch.Tensor] = {}
    parameters = adapter_parameters(model)
    with torch.no_grad(), DistributedBackend(accelerator).gather_params(list(parameters.values())):
        for name, parameter in parameters.items():
            whole: torch.Tensor = parameter
            if isinstance(parameter, DTensor):
                whole = cast(DTensor, parameter.to(accelerator.device)).full_tensor()
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            weights[name] = whole.detach().to("cpu", copy=True)  # ZeRO-3 takes what it gathered away again
    return weights


def check_whole_adapter(accelerator: Accelerator) -> None:
    """
    Raise where the adapter's weights cannot be gathered alone.

    Raises:
        ValueError: below the first version of FSDP.
    """
    if DistributedBackend(accelerator).fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 joins the adapter's weights with those of the base, so the adapter cannot be gathered "
            "alone. Set `fsdp_version: 2` (examples/accelerate_configs/fsdp2.yaml), or `vllm_lora_sync='merge'`."
        )


def check_own_forward(accelerator: Accelerator, gathers_zero_3: bool) -> None:
    """
    Raise where each forward of the policy is one of all processes, which sample with different numbers of them.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Says how the weights are shared.
        gathers_zero_3 (`bool`):
            `ds3_gather_for_generation`: whether ZeRO-3's weights are whole while the policy samples.

    Raises:
        ValueError: below FSDP, and below ZeRO-3 without gathering.
    """
    backend = DistributedBackend(accelerator)
    if accelerator.num_processes > 1 and (backend.is_fsdp or (backend.is_zero3 and not gathers_zero_3)):
        sharing, other = ("FSDP", "") if backend.is_fsdp else ("ZeRO-3", ", or `ds3_gather_for_generation=True`")
        raise ValueError(
            f"The transformers engine cannot sample below {sharing}: processes share each weight, and their trees "
            f"need different numbers of forwards. Set `use_vllm=True`{other}, or train without {sharing}."
        )


def write_adapter(model: "PeftModel", weights: dict[str, torch.Tensor], folder: str) -> str:
    """
    Write the weights of [`gathered_adapter`] and the adapter's config below `folder`; one process alone may call it.

    Returns the folder that an engine loads.
    """
    adapter = cast(str, model.active_adapter)
    model.save_pretrained(folder, selected_adapters=[adapter], state_dict=weights, save_embedding_layers=False)
    return folder if adapter == "default" else os.path.join(folder, adapter)  # as PEFT has it
