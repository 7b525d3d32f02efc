"""The recipe that is asked about, and what of it one small step needs; without a recipe everything."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from trl import ModelConfig

from treepo_trl.treepo_config import TreePOConfig


if TYPE_CHECKING:
    from peft import PeftConfig


NumberType = Literal["bfloat16", "float16", "float32"]

_TRAINING_SETTINGS = (
    "use_vllm",
    "vllm_gpu_memory_utilization",
    "vllm_engine_kwargs",
    "vllm_lora_sync",
    "vllm_base_weights",
    "vllm_share_base_weights",
    "vllm_enable_sleep_mode",
    "vllm_sleep_keeps_weights",
    "tree_packing",
    "gradient_checkpointing",
    "optim",
)
_MODEL_SETTINGS = (
    "dtype",
    "attn_implementation",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "use_dora",
    "use_rslora",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)
_OF_ADAPTERS = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
"""Options of a new adapter, and what they are called in an adapter's config."""


class Recipe(NamedTuple):
    """
    A training as its options say it.

    Attributes:
        training ([`TreePOConfig`]), model ([`~trl.ModelConfig`]):
            Its settings. The number type has a check of its own, and is none here.
        adapter ([`~peft.PeftConfig`], *optional*):
            The adapter that it goes on from.
        tools (`list[str]`, *optional*), environment (`str`, *optional*):
            Import paths, which are not imported here.
        on_cpu (`bool`):
            Whether it computes on the processor, here.
        card_gib (`float`, *optional*):
            The card that it is planned for, if that is not here.
    """

    training: TreePOConfig
    model: ModelConfig
    adapter: "PeftConfig | None"
    tools: list[str] | None
    environment: str | None
    on_cpu: bool
    card_gib: float | None


@dataclass(frozen=True)
class Needs:
    """
    What the checks need of a recipe, in types of JSON.

    Attributes:
        model (`str`):
            Folder or hub name of the model that the step is made on.
        training (`dict`), model_settings (`dict`):
            Settings of [`TreePOConfig`] and of [`~trl.ModelConfig`] for the step.
        number_type (`str`, *optional*):
            What the recipe computes in; `None` without a recipe: then any type will do.
        use_cpu (`bool`):
            Whether the training is to run on the processor.
        has_servers (`bool`):
            Whether vLLM servers sample, and not this machine.
        is_stand_in (`bool`):
            Whether `model` is another one than the recipe's.
    """

    model: str
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    model_settings: dict[str, Any] = field(default_factory=dict[str, Any])
    number_type: NumberType | None = None
    use_cpu: bool = False
    has_servers: bool = False
    is_stand_in: bool = False

    @property
    def is_recipe(self) -> bool:
        """Whether a recipe says what is needed. Else everything is."""
        return self.number_type is not None

    @property
    def device(self) -> torch.device:
        """Where the training would compute."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    @property
    def for_step(self) -> list[str]:
        """Packages without which the small step cannot be made."""
        optional = {
            "peft": self.model_settings["use_peft"],
            "vllm": self.training["use_vllm"],
            "bitsandbytes": self.model_settings.get("load_in_4bit"),
        }
        return [name for name, is_needed in optional.items() if is_needed]

    @property
    def packages(self) -> list[str]:
        """Packages that must be installed."""
        training, model = self.training, self.model_settings
        of_bitsandbytes = any(word in str(training.get("optim", "")) for word in ("8bit", "bnb"))
        engine_in_4bit = training.get("vllm_base_weights") == "quantized" or training.get("vllm_share_base_weights")
        in_4bit = not self.is_recipe or (model.get("load_in_4bit") and engine_in_4bit)
        optional = {
            "peft": model["use_peft"],
            "vllm": training["use_vllm"] or self.has_servers,  # which TRL wants beside its trainer too
            "bitsandbytes": not self.is_recipe
            or model.get("load_in_4bit")
            or model.get("load_in_8bit")
            or of_bitsandbytes,
            "vllm-bnb-plugin": training["use_vllm"] and in_4bit,
        }
        return ["torch", "trl", "transformers", "accelerate", *(name for name, needed in optional.items() if needed)]


def everything(model: str) -> Needs:
    """Without a recipe: LoRA, vLLM and 4 bits, any number type."""
    return Needs(model, {"use_vllm": True}, {"dtype": "auto", "use_peft": True, "lora_target_modules": ["all-linear"]})


def of_recipe(model: str, recipe: Recipe, number_type: NumberType, use_cpu: bool) -> Needs:
    """
    What a recipe needs.

    Args:
        model (`str`):
            What the step is made on.
        recipe ([`Recipe`]):
            The recipe.
        number_type (`str`), use_cpu (`bool`):
            What it says about them, which `recipe.training` may not: an unfit number type is refused there.
    """
    training, model_settings = _values(recipe.training, _TRAINING_SETTINGS), _values(recipe.model, _MODEL_SETTINGS)
    if recipe.adapter is not None:  # the step's model may be another one, and gets a new adapter that is like it
        own = {option: getattr(recipe.adapter, name, None) for option, name in _OF_ADAPTERS.items()}
        model_settings |= {"use_peft": True, **{option: value for option, value in own.items() if value is not None}}
    has_servers = training["use_vllm"] and recipe.training.vllm_mode == "server"
    training["use_vllm"] = training["use_vllm"] and not has_servers
    is_stand_in = recipe.model.model_name_or_path != model
    return Needs(model, training, model_settings, number_type, use_cpu, has_servers, is_stand_in)


def _values(settings: object, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(settings, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in values.items()}  # `optim` is an enum
