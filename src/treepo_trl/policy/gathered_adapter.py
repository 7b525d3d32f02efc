"""
A policy's LoRA adapter in whole tensors, and its folder as engines load it, also where processes share the weights.

FSDP2 and DeepSpeed's ZeRO-3 leave each process a part of each weight. PEFT's `save_pretrained` asks for the memory of
whole ones: it fails on the parts of FSDP2, and writes empty tensors of ZeRO-3.
"""

import os
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
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in adapter_parameters(model).values())


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


def write_adapter(model: "PeftModel", weights: dict[str, torch.Tensor], folder: str) -> str:
    """
    Write the weights of [`gathered_adapter`] and the adapter's config below `folder`; one process alone may call it.

    Returns the folder that an engine loads.
    """
    adapter = cast(str, model.active_adapter)
    model.save_pretrained(folder, selected_adapters=[adapter], state_dict=weights, save_embedding_layers=False)
    return folder if adapter == "default" else os.path.join(folder, adapter)  # as PEFT has it
