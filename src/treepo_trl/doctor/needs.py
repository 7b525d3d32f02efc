"""What is to be checked: everything, or what one recipe needs and no more."""

from dataclasses import dataclass, field
from typing import Any, Literal


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


@dataclass(frozen=True)
class Needs:
    """
    Attributes:
        model (`str`):
            Folder or hub name of the model that the checks run on.
        training (`dict`):
            Settings of [`TreePOConfig`] for the small training of the checks.
        model_settings (`dict`):
            Fields of [`~trl.ModelConfig`] for it.
        number_type (`str`, *optional*):
            What the recipe computes in; `None` without a recipe: then any type will do.
        use_cpu (`bool`):
            Whether the training is to run on the processor.
        is_recipe (`bool`):
            Whether a recipe says what is needed. Else everything is.
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
    is_recipe: bool = False
    has_servers: bool = False
    is_stand_in: bool = False

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM samples in this process."""
        return bool(self.training["use_vllm"])

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA is trained."""
        return bool(self.model_settings["use_peft"])

    @property
    def needs_4bit(self) -> bool:
        """Whether there are weights in 4 bits, or an optimizer of bitsandbytes, which the same check tries."""
        eight_bit = any(word in str(self.training.get("optim", "")) for word in ("8bit", "bnb"))
        return not self.is_recipe or bool(self.model_settings.get("load_in_4bit")) or eight_bit

    @property
    def sleeps(self) -> bool:
        """Whether the engine leaves the card during the update."""
        return self.uses_vllm and (not self.is_recipe or bool(self.training.get("vllm_enable_sleep_mode")))

    @property
    def backends(self) -> list[Literal["sdpa", "flex"]]:
        """Kernels of the packed update that may be used."""
        packing = self.training.get("tree_packing", "auto")
        if packing == "off":
            return []
        return ["sdpa", "flex"] if packing == "auto" else [packing]

    @property
    def packages(self) -> list[str]:
        """Packages that must be installed."""
        training = self.training
        in_4bit = self.model_settings.get("load_in_4bit")
        engine_in_4bit = training.get("vllm_base_weights") == "quantized" or training.get("vllm_share_base_weights")
        optional = {
            "peft": self.has_adapter,
            "vllm": self.uses_vllm or self.has_servers,  # which TRL wants beside its trainer too
            "bitsandbytes": self.needs_4bit or bool(self.model_settings.get("load_in_8bit")),
            "vllm-bnb-plugin": self.uses_vllm and (not self.is_recipe or bool(in_4bit and engine_in_4bit)),
        }
        needed = [name for name, is_needed in optional.items() if is_needed]
        return ["torch", "trl", "transformers", "accelerate", *needed]


def everything(model: str) -> Needs:
    """Without a recipe: LoRA, vLLM and 4 bits, the kernels that `auto` may choose, any number type."""
    return Needs(model, {"use_vllm": True}, {"dtype": "auto", "use_peft": True, "lora_target_modules": ["all-linear"]})


def of_recipe(model: str, training_args: object, model_args: object, number_type: NumberType, use_cpu: bool) -> Needs:
    """
    What a recipe needs.

    Args:
        model (`str`):
            What the checks run on.
        training_args ([`TreePOConfig`]), model_args ([`~trl.ModelConfig`]):
            The recipe.
        number_type (`str`), use_cpu (`bool`):
            What it says about them, which `training_args` may not: an unfit number type is refused there.
    """
    training, model_settings = _values(training_args, _TRAINING_SETTINGS), _values(model_args, _MODEL_SETTINGS)
    has_servers = training["use_vllm"] and getattr(training_args, "vllm_mode", None) == "server"
    training["use_vllm"] = training["use_vllm"] and not has_servers
    is_stand_in = getattr(model_args, "model_name_or_path", model) != model
    return Needs(model, training, model_settings, number_type, use_cpu, True, has_servers, is_stand_in)


def _values(settings: object, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(settings, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in values.items()}  # `optim` is an enum
