"""The modules of a recipe's adapter on a model that it was not written for."""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

from treepo_trl.policy.starting_adapter import new_adapter_config

from .needs import Needs


def with_modules_of_model(needs: Needs) -> tuple[Needs, str | None]:
    """
    The same needs with an adapter that the checked model can have.

    Where the checks run on another model than the recipe's, and that has none of the adapter's modules, the adapter
    goes on all linear layers. Only the model's config is read.

    Returns:
        Needs, and what was changed in words; `None` if nothing was.
    """
    if not (needs.has_adapter and needs.is_stand_in):
        return needs, None
    peft_config: Any = new_adapter_config(ModelConfig(needs.model, **needs.model_settings))
    wanted = peft_config.target_modules
    if wanted is None or wanted == "all-linear" or _has_any(needs.model, peft_config):
        return needs, None
    settings = {**needs.model_settings, "lora_target_modules": ["all-linear"]}
    names = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
    return replace(needs, model_settings=settings), f"LoRA on all linear layers, as this model has no {names}"


def _has_any(name: str, peft_config: object) -> bool:
    """Whether PEFT finds a module of the adapter in this model, or nobody knows."""
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    except (ValueError, OSError):  # a model that is loaded in another way, or none: its own check says more
        return True
    return any(check_target_module_exists(peft_config, module) for module, _ in model.named_modules())
