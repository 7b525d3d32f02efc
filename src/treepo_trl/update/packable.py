"""
May a model's rows be packed? All questions that decide it, asked once, when a trainer is built.

`packed_forward_for` asks them in order: the model's config, its attention, and whether its forward hands
`tree_attention` on.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from treepo_trl.model_support import (
    FULL_REACH,
    Reach,
    has_attention_dropout,
    layer_reaches,
    leaves_out_softcap,
    other_layers,
    without_adapter,
)

from .packed_forward import PackedForward
from .packing import TreePacking
from .tree_attention import LayerAttention, serve_trees


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)

_ALIBI = "it has ALiBi biases, which count packed positions instead of depths"
_RECURRENT = "it is recurrent"
_WINDOW = "it has attention windows of its own, which count packed positions instead of depths"
_LENGTH = "the scale of its attention grows with packed positions instead of depths"
_ABSOLUTE = "its absolute positions make plain rows depend on their padding, which a packed row has not"
_UNPACKABLE_MODELS = {
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "jamba", "falcon_mamba", "recurrent_gemma", "xlstm"), _RECURRENT),
    **dict.fromkeys(("gpt_neo", "doge"), _WINDOW),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "biogpt", "xglm", "ctrl"), _ABSOLUTE),
}


class PackingSettings(Protocol):
    """The settings of a trainer that decide how its rows are forwarded; `TreePOConfig` has them."""

    @property
    def tree_packing(self) -> TreePacking: ...
    @property
    def max_tokens_per_micro_batch(self) -> int | None: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def gradient_checkpointing_kwargs(self) -> object: ...


def packed_forward_for(
    model: "PreTrainedModel | PeftModel", args: PackingSettings, accelerator: Accelerator, has_aux_loss: bool
) -> PackedForward | str | None:
    """
    The packed forward of a model, or why its rows stay plain.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, before it is wrapped for training.
        args ([`TreePOConfig`]):
            Settings of the training.
        accelerator ([`~accelerate.Accelerator`]):
            Device, number of processes and sharding of the training.
        has_aux_loss (`bool`):
            Whether the loss includes a load-balancing loss.

    Returns:
        [`PackedForward`]; with `tree_packing="auto"` a sentence such as "Shared prefixes are not packed for
        GPT2LMHeadModel: reason." where the model cannot be packed; `None` with `tree_packing="off"`.

    Raises:
        ValueError: if the settings need what this model or machine does not have, with what to set instead.
    """
    if args.tree_packing == "off":
        return None
    base = without_adapter(model)
    reason = _why_not_packed(base, has_aux_loss)
    if reason is None:
        is_sharded = _is_sharded(accelerator)
        _check_flex(args, base.config.get_text_config(), accelerator)
        _check_token_budget(args, accelerator, is_sharded, has_aux_loss)
        return PackedForward(args.tree_packing, accelerator, is_sharded, args.max_tokens_per_micro_batch)
    message = f"Shared prefixes are not packed for {type(base).__name__}: {reason}."
    if args.tree_packing != "auto":
        raise ValueError(f"`tree_packing` is {args.tree_packing!r}, but {message} Set it to 'off'.")
    if args.max_tokens_per_micro_batch is not None:
        raise ValueError(f"`max_tokens_per_micro_batch` counts tokens of packed rows, but {message} Leave it out.")
    return message


def packed_forward_or_none(
    model: "PreTrainedModel | PeftModel", args: PackingSettings, accelerator: Accelerator, has_aux_loss: bool
) -> PackedForward | None:
    """[`packed_forward_for`]; with a warning where rows stay plain that could be wanted otherwise."""
    _warn_of_softcap(without_adapter(model).config.get_text_config())
    packed = packed_forward_for(model, args, accelerator, has_aux_loss)
    if isinstance(packed, str):
        logger.warning(f"{packed} Training forwards plain rows, as GRPOTrainer does.")
        return None
    return packed


def _warn_of_softcap(config: PreTrainedConfig) -> None:
    """Say when transformers trains a model without a part of its attention, which engines have."""
    softcap, attention = getattr(config, "attn_logit_softcapping", None), config._attn_implementation
    if softcap is not None and leaves_out_softcap(attention):
        logger.warning(
            f"The model bounds its attention scores at {softcap}, which transformers leaves out with {attention!r} "
            "attention, so the policy is not the model that vLLM serves. Load it with `attn_implementation='eager'`."
        )


def _is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP or DeepSpeed splits the training over processes, asked as transformers' `Trainer` asks."""
    state = accelerator.state
    return any(getattr(state, plugin, None) is not None for plugin in ("fsdp_plugin", "deepspeed_plugin"))


# The model


def _why_not_packed(base: PreTrainedModel, has_aux_loss: bool) -> str | None:
    """Why rows of this model, without its adapter, cannot be packed; `None` if they can."""
    config = base.config.get_text_config()
    reason = why_not_packable(config)
    if reason is not None:
        return reason
    if not base._supports_attention_backend:
        return "its attention does not go through transformers' common interface"
    if config._attn_implementation != "eager" or layer_reaches(config) != {"full_attention": FULL_REACH}:
        reason = why_no_trees(base)
    if reason is not None or config._attn_implementation != "eager":
        return reason
    return "its load-balancing loss does not go with the mask of eager attention" if has_aux_loss else None


def why_not_packable(config: PreTrainedConfig) -> str | None:
    """
    Why a tree mask cannot serve a model with this config; `None` if it can.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.
    """
    attention = config._attn_implementation
    if attention != "eager" and attention not in AttentionInterface():
        return f"its attention is {attention!r} (load it with `attn_implementation='sdpa'`, or 'eager')"
    other = other_layers(config)
    if other is not None:
        return f"it has {other}"
    if getattr(config, "alibi", False):
        return _ALIBI
    if getattr(config, "attn_temperature_tuning", False):
        return _LENGTH
    return _UNPACKABLE_MODELS.get(config.model_type)


def why_no_trees(model: PreTrainedModel) -> str | None:
    """
    Why a model cannot be given `tree_attention`; `None` if it hands it on to its attention function.

    Tried on copies of the model without weights, one for each kind of attention layer that it has. A copy's forward
    runs until it reaches the first layer's attention, which must see as far as the model's config says.
    """
    reaches = layer_reaches(model.config.get_text_config())
    reasons = (_why_no_trees_in(model, kind, reach, len(reaches) > 1) for kind, reach in reaches.items())
    return next((reason for reason in reasons if reason is not None), None)


def _why_no_trees_in(model: PreTrainedModel, kind: str, expected: Reach, is_one_of_several: bool) -> str | None:
    """[`why_no_trees`] of layers of one kind, which see as far as `expected`."""

    def probe(*call: object) -> torch.Tensor:
        raise _ReachedError(cast(LayerAttention, call[-1]).reach)

    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text._attn_implementation = config._attn_implementation = "eager"  # every model has it
    if is_one_of_several:
        text.num_hidden_layers, text.layer_types = 1, [kind]
        if getattr(text, "num_kv_shared_layers", None):  # with a layer before it
            text.num_kv_shared_layers = 0
    serve_trees("sdpa")
    try:
        with torch.device("meta"), torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.int64)
            mask = torch.ones_like(tokens)[None, None]
            copied = cast(Callable[[PreTrainedConfig], torch.nn.Module], type(model))(config)
            text._attn_implementation = config._attn_implementation = "sdpa"
            copied(
                input_ids=tokens,
                position_ids=tokens,
                attention_mask={kind: mask} if is_one_of_several else mask,
                tree_attention=probe,
                use_cache=False,
            )
    except _ReachedError as reached:
        if reached.reach == expected:
            return None
        return f"its layers of type {kind} do not give their attention the window that its config names"
    except Exception as error:  # whatever it is, the packed forward would meet it
        text_of_error = (str(error) or "no message").splitlines()[0]
        return f"its forward does not take `tree_attention` ({type(error).__name__}: {text_of_error})"
    return "it does not hand keywords on to its attention"


class _ReachedError(Exception):
    """The probe of `why_no_trees` was called, by a layer that sees that far."""

    def __init__(self, reach: Reach) -> None:
        super().__init__(reach)
        self.reach = reach


# The settings


def _check_flex(args: PackingSettings, config: PreTrainedConfig, accelerator: Accelerator) -> None:
    """Raise where `tree_packing="flex"` cannot serve this device or the model with this text config."""
    if args.tree_packing != "flex":
        return
    device_type = accelerator.device.type
    if device_type != "cuda":
        raise ValueError(
            f"`tree_packing='flex'` needs a CUDA device, this is {device_type!r}: FlexAttention has no backward "
            "pass there. Set `tree_packing='sdpa'` or 'auto'."
        )
    if config._attn_implementation == "eager":
        raise ValueError(
            "`tree_packing='flex'` needs a model whose attention can be replaced, this one has 'eager'. Load it "
            "with `attn_implementation='sdpa'`."
        )
    if has_attention_dropout(config):
        raise ValueError(
            f"`tree_packing='flex'` has no dropout, but the model has `attention_dropout="
            f"{getattr(config, 'attention_dropout', None)}`. Set that to 0, or `tree_packing='sdpa'`."
        )


def _check_token_budget(args: PackingSettings, accelerator: Accelerator, is_sharded: bool, has_aux_loss: bool) -> None:
    """Raise where `max_tokens_per_micro_batch` cannot hold."""
    if args.max_tokens_per_micro_batch is None:
        return
    if is_sharded:
        raise ValueError(
            "`max_tokens_per_micro_batch` is not supported with FSDP and DeepSpeed: their processes would run "
            "different numbers of forwards and wait for each other. Lower `per_device_train_batch_size` instead."
        )
    checkpointing = args.gradient_checkpointing_kwargs
    is_reentrant = isinstance(checkpointing, dict) and checkpointing.get("use_reentrant")
    if accelerator.num_processes > 1 and args.gradient_checkpointing and is_reentrant:
        raise ValueError(
            "`max_tokens_per_micro_batch` is not supported with several processes and `use_reentrant=True` in "
            "`gradient_checkpointing_kwargs`: gradients would be reduced before the last piece. Set it to False."
        )
    if has_aux_loss:
        raise ValueError(
            "`max_tokens_per_micro_batch` is not supported with a load-balancing loss, which would depend on how the "
            "rows are cut. Lower `per_device_train_batch_size` instead, or set `router_aux_loss_coef=0`."
        )
