"""
What a training will take of one GPU's memory, counted before it starts.

Weights, adapter, optimizer and cache are counted exactly, from the model's config. Activations are counted by
`activations.py`. The rest is a reserve, which is an assumption.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from trl import ModelConfig
from trl.trainer.utils import disable_dropout_in_model

from treepo_trl.model_support import layer_heads
from treepo_trl.policy.four_bit_base import base_of, by_size
from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.treepo_config import TreePOConfig

from .activations import STAND_IN, activation_bytes, register_stand_in
from .weights import BaseSizes, NotPlannedError, four_bit_config


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


GIB = 2**30
_LARGEST_ENGINE = 0.95  # of the card: vLLM wants what it is promised to be free
RESERVE = 1.5 * GIB
"""CUDA context, fragmentation, temporary buffers: an assumption, not a measurement."""


@dataclass
class MemoryPlan:
    """
    Bytes by part, and what follows from them.

    Attributes:
        card (`float`):
            Memory of the GPU.
        policy (`dict[str, float]`):
            Parts of the policy: weights, adapter or reference model, gradients, optimizer, activations. Weights that
            it shares with the engine are counted there.
        micro_batch_tokens (`int`):
            Tokens of the largest micro-batch that activations are counted for.
        share (`float`):
            vLLM's share of the card: `vllm_gpu_memory_utilization`, planned where that is `"auto"`.
        engine (`dict[str, float]`):
            Parts of vLLM's share: weights, and what they leave to cache and buffers; empty without vLLM.
        cache_tokens (`int`):
            Tokens that fit the cache at most: vLLM's own buffers take a part of it.
        longest (`int`):
            Tokens of the longest sequence that the engine must hold.
        base_weights (`str` or `None`):
            How the engine of a 4-bit policy gets its base.
        sleeps (`bool`):
            Whether the engine leaves the card during the update.
        keeps_weights (`bool`):
            Whether a sleeping engine frees its cache alone.
        shares (`bool`):
            Whether policy and engine share the base.
        could_share (`bool`):
            Whether policy and engine could share the base, but do not.
    """

    card: float
    policy: dict[str, float]
    micro_batch_tokens: int
    share: float = 0.0
    engine: dict[str, float] = field(default_factory=dict)
    cache_tokens: int = 0
    longest: int = 0
    base_weights: str | None = None
    sleeps: bool = False
    keeps_weights: bool = False
    shares: bool = False
    could_share: bool = False

    @property
    def rollout(self) -> float:
        """Bytes while completions are sampled."""
        resident = sum(size for name, size in self.policy.items() if name not in ("gradients", "activations"))
        return resident + sum(self.engine.values()) + RESERVE

    @property
    def update(self) -> float:
        """Bytes in the backward pass."""
        engine = sum(self.engine.values())
        if self.sleeps:
            engine = self.engine["weights"] if self.keeps_weights else 0.0
        return sum(self.policy.values()) + engine + RESERVE

    def problems(self) -> list[str]:
        """Reasons why this may not run, each with the settings to change; empty if there is none."""
        found = []
        if self.rollout > self.card:
            once = ", let it share the base with vLLM (`vllm_share_base_weights`)" if self.could_share else ""
            found.append(
                f"Sampling takes {self.rollout / GIB:.1f} GiB of the card's {self.card / GIB:.1f}: lower "
                f"`vllm_gpu_memory_utilization`, or load the policy in 4 bits (`load_in_4bit`){once}."
            )
        if self.update > self.card:
            once = "`vllm_share_base_weights=True`, " if self.could_share else ""
            found.append(
                f"The update takes {self.update / GIB:.1f} GiB of the card's {self.card / GIB:.1f}: set {once}"
                "`vllm_enable_sleep_mode=True` (vLLM leaves the card), `gradient_checkpointing=True`, a lower "
                "`max_tokens_per_micro_batch` or `per_device_train_batch_size`, an 8-bit `optim`, or an adapter "
                "(`use_peft`)."
            )
        if self.engine and self.cache_tokens < self.longest:
            found.append(
                f"vLLM's cache holds at most {max(self.cache_tokens, 0)} tokens, one prompt with its completion may "
                f"have {self.longest}: raise `vllm_gpu_memory_utilization`, lower `vllm_max_model_length`, or set "
                "`vllm_base_weights='quantized'`."
            )
        return found

    def impossible(self) -> str | None:
        """
        Why this cannot run, from weights and gradients alone; `None` if it may run.

        Optimizers may page, activations and the reserve are estimates, and caches differ by model. They do not count
        here, so that no training is refused that would run.
        """
        resident = self.policy["weights"] + self.policy["gradients"]
        if resident <= self.card:
            return None
        return (
            f"The policy's weights and gradients take {resident / GIB:.1f} GiB, the card has {self.card / GIB:.1f}. "
            "Train an adapter (`use_peft=True`), load the base in 4 bits (`load_in_4bit=True`), or take a smaller "
            "model."
        )

    def table(self) -> str:
        """The parts as text, one per line, in GiB."""
        lines = [("policy: " + name, size) for name, size in self.policy.items()]
        lines += [("vLLM: " + name, size) for name, size in self.engine.items()]
        lines += [("reserve", RESERVE), ("while sampling", self.rollout), ("in the update", self.update)]
        lines.append(("card", self.card))
        rows = [f"{name:<44}{size / GIB:>8.2f} GiB" for name, size in lines]
        notes = [f"activations: {self.micro_batch_tokens} tokens per micro-batch"]
        if self.engine:
            notes.append(f"vllm_gpu_memory_utilization: {self.share:.2f}")
            notes.append(f"cache: at most {self.cache_tokens} tokens, the longest sequence may have {self.longest}")
        if self.base_weights:
            notes.append(f"vLLM's base: {self.base_weights}")
        if self.shares:
            notes.append("policy and vLLM share the base")
        if self.sleeps:
            what = "vLLM's cache leaves" if self.keeps_weights else "vLLM leaves"
            notes.append(f"{what} the card during the update")
        return "\n".join([*rows, *notes])


def plan_memory(
    config: PreTrainedConfig,
    training_args: TreePOConfig,
    model_args: ModelConfig,
    card: float,
    adapter: "PeftConfig | None" = None,
) -> MemoryPlan:
    """
    Count what a training takes on one GPU.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Config of the model.
        training_args ([`TreePOConfig`]):
            Arguments of the training.
        model_args ([`~trl.ModelConfig`]):
            Precision, quantization and adapter, as TRL's scripts take them.
        card (`float`):
            The GPU's memory in bytes.
        adapter ([`~peft.PeftConfig`], *optional*):
            The adapter that the training goes on from, instead of a new one.

    Raises:
        ValueError: if the card is smaller than a tenth of a GiB, because its size was then given in another unit.
        NotPlannedError: for weights in 8 bits; for a checkpoint that is quantized otherwise than by bitsandbytes to 4
            bits. A model that transformers cannot build on the meta device raises what transformers raises.
    """
    if card < 0.1 * GIB:
        raise ValueError(f"The card's memory is {card:.0f} bytes. Give it in GiB: `--card_gib 24`.")
    if model_args.load_in_8bit or "quantization_config" in (training_args.model_init_kwargs or {}):
        raise NotPlannedError(
            "Weights in 8 bits and `quantization_config` in `model_init_kwargs` are not planned yet."
        )
    four_bits = four_bit_config(config, model_args)
    dtype = _dtype(config, training_args, model_args)
    model = _build(config, dtype, adapter or new_adapter_config(model_args), bool(training_args.trust_remote_code))
    if training_args.disable_dropout:
        disable_dropout_in_model(model)
    is_adapter = not isinstance(model, PreTrainedModel)
    base = BaseSizes.of(base_of(model) if is_adapter else model, dtype, four_bits, _dtype_in_checkpoint(config))
    tokens = _micro_batch_tokens(training_args)
    activations = activation_bytes(model, tokens, bool(training_args.gradient_checkpointing))
    activations += base.largest_in_4bit * dtype.itemsize  # one layer's weights at a time, dequantized
    # TRL keeps the adapter of a 4-bit model in bfloat16, PEFT that of others in float32, as float16 needs it.
    itemsize = (2 if four_bits and not training_args.fp16 else 4) if is_adapter else dtype.itemsize
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    policy = {"weights": base.in_policy}
    if is_adapter:
        policy["adapter"] = float(numel * itemsize)
        if adapter is not None and training_args.beta != 0:
            policy["reference adapter"] = float(numel * itemsize)
    elif training_args.beta != 0:
        policy["reference model"] = base.in_policy
    policy |= {
        "gradients": float(numel * itemsize),
        "optimizer": numel * _optimizer_bytes(getattr(training_args.optim, "value", training_args.optim), itemsize),
        "activations": float(activations),
    }
    plan = MemoryPlan(card=card, policy=policy, micro_batch_tokens=tokens)
    if training_args.use_vllm:
        _add_engine(plan, config, training_args, base, is_adapter)
    return plan


def _add_engine(
    plan: MemoryPlan, config: PreTrainedConfig, args: TreePOConfig, base: BaseSizes, is_adapter: bool
) -> None:
    """Fill in vLLM's share of the card, and take from the policy what the engine holds for it."""
    plan.longest = args.vllm_max_model_length or config.get_text_config().max_position_embeddings
    plan.sleeps = bool(args.vllm_enable_sleep_mode)
    plan.keeps_weights = args.vllm_sleep_keeps_weights or args.vllm_share_base_weights
    can_share = is_adapter and base.engine_can_hold
    if args.vllm_share_base_weights:
        if not can_share:
            raise ValueError(
                "`vllm_share_base_weights=True` needs an adapter (`--use_peft`) on a base that vLLM has alike: all "
                "linear layers but the head in 4 bits, or the checkpoint's 16 bits (mostly `--dtype bfloat16`; this "
                f"is {base.dtype})."
            )
        plan.shares = True
        plan.policy["weights"] -= base.shared
    elif (args.vllm_lora_sync, args.vllm_tensor_parallel_size) == ("adapter", 1):
        plan.could_share = can_share and args.vllm_base_weights != "dequantized"
    wanted = args.vllm_gpu_memory_utilization
    plan.share = _share_left(plan) if isinstance(wanted, str) else wanted
    share = plan.share * plan.card
    if base.double is not None:
        plan.base_weights = args.vllm_base_weights
        if plan.base_weights == "auto":
            choice = "quantized" if plan.shares else by_size(base.in_engine(quantized=False), share)
            plan.base_weights = choice if base.engine_can_hold else "dequantized"
    weights = base.in_engine(quantized=plan.base_weights == "quantized")
    per_token = _cache_bytes_per_token(config.get_text_config())
    plan.cache_tokens = int((share - weights) // per_token)
    plan.engine = {"weights": weights, "cache and buffers": max(share - weights, 0.0)}


def _share_left(plan: MemoryPlan) -> float:
    """The largest share of the card that a plan without its engine leaves to it, in hundredths."""
    left = plan.card - plan.rollout
    if not plan.sleeps:
        left = min(left, plan.card - plan.update)
    return max(math.floor(100 * min(left / plan.card, _LARGEST_ENGINE)) / 100, 0.0)


def _cache_bytes_per_token(text: PreTrainedConfig) -> int:
    """Bytes of vLLM's cache in 16 bits, with full attention in every layer."""
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention caches one vector for all heads
        return 2 * (text.kv_lora_rank + text.qk_rope_head_dim) * text.num_hidden_layers
    return 2 * sum(heads.key_count * (heads.size + heads.value_size) for heads in layer_heads(text))


def _dtype_in_checkpoint(config: PreTrainedConfig) -> torch.dtype | None:
    return getattr(config, "dtype", None)


def _dtype(config: PreTrainedConfig, args: TreePOConfig, model_args: ModelConfig) -> torch.dtype:
    """Precision that the policy is loaded in: `model_init_kwargs` go before `--dtype`, as in the trainer."""
    options = cast(dict[str, torch.dtype | str | None], args.model_init_kwargs or {})
    dtype = options.get("dtype", model_args.dtype)
    if dtype is None or dtype == "auto":
        dtype = _dtype_in_checkpoint(config) or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def _build(
    config: PreTrainedConfig, dtype: torch.dtype, peft_config: "PeftConfig | None", trust_remote_code: bool
) -> "PreTrainedModel | PeftModel":
    """The policy on the meta device, with its adapter if it trains one."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    register_stand_in()
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # layers are counted as what they stand for
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise NotPlannedError(f"Models of type {config.model_type} are no causal language models of transformers.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=STAND_IN, trust_remote_code=trust_remote_code
        )
        if peft_config is None:
            return model
        peft_config = copy.deepcopy(peft_config)
        peft_config.inference_mode = False  # as an adapter is saved
        return get_peft_model(model, peft_config)


def _micro_batch_tokens(args: TreePOConfig) -> int:
    """
    Tokens of the largest micro-batch: its budget, else that of rows which share nothing.

    A prompt without a bound is counted with 512 tokens.
    """
    row = args.vllm_max_model_length or int(args.max_completion_length or 256) + 512
    rows = args.per_device_train_batch_size * row
    budget = args.max_tokens_per_micro_batch
    return rows if budget is None else min(rows, max(budget, row))


def _optimizer_bytes(optim: str, itemsize: int) -> float:
    """Bytes of the optimizer's states per trainable weight: Adam's two moments, in its precision or in 8 bits."""
    if "8bit" in optim:
        return 2.0
    return 0.0 if optim in ("sgd", "adafactor") else 2.0 * itemsize
