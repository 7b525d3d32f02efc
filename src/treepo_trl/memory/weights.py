"""The weights of a base model: how many there are, and how many bytes they take in the policy and in the engine."""

from dataclasses import dataclass
from typing import cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module
from trl import ModelConfig

from treepo_trl.policy.four_bit_base import linear_layers


# Bytes of a weight in 4 bits, by whether the scales are quantized too. A block of 64 weights has one scale of 32 bits.
# Quantized it has 8 bits, and 256 of them share one of 32 bits.
_BYTES_4BIT = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}


class NotPlannedError(ValueError):
    """A training that is not counted yet, and that may be right all the same."""


@dataclass
class BaseSizes:
    """
    Numbers of weights of the base model, and how the policy holds them.

    Attributes:
        numel (`int`):
            All weights.
        in_4bit (`int`):
            Weights in 4 bits.
        largest_in_4bit (`int`):
            Weights of the largest layer in 4 bits.
        in_experts (`int`):
            Weights of experts that lie in one tensor.
        dtype (`torch.dtype`):
            Precision of the weights that are not in 4 bits.
        double (`bool` or `None`):
            Whether the scales of 4-bit weights are quantized too; `None` without 4-bit weights.
        engine_can_hold (`bool`):
            Whether vLLM can have the same weights: all linear layers but the head in 4 bits, or all weights in the
            checkpoint's 16 bits.
    """

    numel: int
    in_4bit: int
    largest_in_4bit: int
    in_experts: int
    dtype: torch.dtype
    double: bool | None
    engine_can_hold: bool

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        dtype: torch.dtype,
        four_bits: BitsAndBytesConfig | None,
        dtype_in_checkpoint: torch.dtype | None,
    ) -> "BaseSizes":
        in_experts = sum(p.numel() for p in base.parameters() if p.dim() > 2)
        linear: list[int] = []
        engine_can_hold = dtype.itemsize == 2 and dtype_in_checkpoint in (None, torch.float32, dtype)
        if four_bits is not None:
            skipped = four_bits.llm_int8_skip_modules
            layers = [(name.replace(".base_layer", ""), layer.weight.numel()) for name, layer in linear_layers(base)]
            linear = [numel for name, numel in layers if should_convert_module(name, skipped)]
            head = _head_in_4bit(base, skipped)
            is_uint8 = four_bits.bnb_4bit_quant_storage in (None, torch.uint8)
            engine_can_hold = len(linear) == len(layers) and not in_experts and not head and is_uint8
            linear += [head] if head else []
        return cls(
            numel=sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name),
            in_4bit=sum(linear),
            largest_in_4bit=max(linear, default=0),
            in_experts=in_experts,
            dtype=dtype,
            double=None if four_bits is None else bool(four_bits.bnb_4bit_use_double_quant),
            engine_can_hold=engine_can_hold,
        )

    @property
    def in_policy(self) -> float:
        """Bytes that the policy takes for its base."""
        return (self.numel - self.in_4bit) * self.dtype.itemsize + self.in_4bit * _BYTES_4BIT[bool(self.double)]

    @property
    def shared(self) -> float:
        """
        Bytes that the policy can share with the engine.

        The scales of 4-bit weights are not shared. Nor are weights in another precision than the engine's 16 bits, nor
        experts, which vLLM arranges otherwise.
        """
        others = self.numel - self.in_4bit - self.in_experts if self.dtype.itemsize == 2 else 0
        return self.in_4bit / 2 + 2 * others

    def in_engine(self, quantized: bool) -> float:
        """Bytes. vLLM holds float32 checkpoints in 16 bits, and the scales of 4-bit weights in float32."""
        if not quantized:
            return 2.0 * self.numel
        return 2 * (self.numel - self.in_4bit) + self.in_4bit * _BYTES_4BIT[False]


def _head_in_4bit(base: PreTrainedModel, skipped: list[str] | None) -> int:
    """
    Weights of the output head if transformers quantizes it, else 0.

    It does so if the head does not share the embeddings' weights, and a list of exceptions is given without the head.
    """
    head = cast(torch.nn.Linear | None, base.get_output_embeddings())
    if skipped is None or head is None or head.weight is base.get_input_embeddings().weight:
        return 0
    (name,) = [name for name, module in base.named_modules() if module is head]
    return head.weight.numel() if should_convert_module(name, skipped) else 0


def four_bit_config(config: PreTrainedConfig, model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How the policy is quantized to 4 bits, by the arguments or in its checkpoint; `None` if it is not."""
    from trl import get_quantization_config

    given: dict[str, object] | BitsAndBytesConfig | None = getattr(config, "quantization_config", None)
    if given is None:
        return get_quantization_config(model_args) if model_args.load_in_4bit else None
    in_checkpoint = given if isinstance(given, dict) else given.to_dict()
    if in_checkpoint.get("quant_method") != "bitsandbytes" or not in_checkpoint.get("load_in_4bit"):
        raise NotPlannedError(
            f"The checkpoint is quantized by {in_checkpoint.get('quant_method')!r}; only 4 bits of bitsandbytes are "
            "planned yet."
        )
    return cast(BitsAndBytesConfig, BitsAndBytesConfig.from_dict(in_checkpoint))
