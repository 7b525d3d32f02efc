"""What a model's config says about its attention, for the transformers engine and for packed rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import is_peft_model


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Reach:
    """
    Which of its ancestors a token attends to in a layer.

    Args:
        window (`int`, *optional*):
            Those less than this many positions away, itself included. Default: all of them.
        chunk (`int`, *optional*):
            Those in the same chunk of this many positions, counted from the beginning of the sequence.
    """

    window: int | None = None
    chunk: int | None = None

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """
        Whether tokens at `query` positions see ancestors of theirs at `key` positions, in the shape of both together.

        What is seen stays seen when the query comes nearer or the key comes later, so bounds of both may be asked.
        """
        if self.window is not None:
            return query - key < self.window
        if self.chunk is not None:
            return query // self.chunk <= key // self.chunk
        return torch.ones_like(query, dtype=torch.bool) & torch.ones_like(key, dtype=torch.bool)


FULL_REACH = Reach()


def layer_reaches(config: "PreTrainedConfig") -> dict[str, Reach]:
    """
    The reach of each kind of attention layer that a model has, by its name in `config.layer_types`.

    A model without `layer_types` has one kind, "full_attention" or "sliding_attention".

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.
    """
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    reaches = {
        "full_attention": FULL_REACH,
        "sliding_attention": Reach(window=window),
        "chunked_attention": Reach(chunk=chunk),
    }
    kinds = layer_types(config)
    if not kinds:
        has_window = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if has_window else "full_attention"]
    return {kind: reaches[kind] for kind in dict.fromkeys(kinds) if kind in reaches}


def layer_types(config: "PreTrainedConfig") -> list[str]:
    """The kind of each layer, as transformers names them; empty for a model that has one kind."""
    return list(getattr(config, "layer_types", None) or [])  # of some models a property


@dataclass(frozen=True)
class Heads:
    """
    Attention heads of a layer.

    Args:
        count (`int`), key_count (`int`):
            Heads of queries, and of keys and values.
        size (`int`), value_size (`int`):
            Dimensions of a head of queries and keys, and of values.
    """

    count: int
    key_count: int
    size: int
    value_size: int


def is_heterogeneous(config: "PreTrainedConfig") -> bool:
    """Whether settings differ between layers, as head sizes of Gemma 4 do. Older transformers have no such configs."""
    return getattr(config, "is_heterogeneous", False)


def layer_heads(config: "PreTrainedConfig") -> list[Heads]:
    """
    The heads of each layer, as if each had attention.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.
    """
    if is_heterogeneous(config):
        return [_heads(layer) for layer in config.per_layer_config]
    return [_heads(config)] * config.num_hidden_layers


def _heads(config: "PreTrainedConfig") -> Heads:
    count = config.num_attention_heads
    key_count = getattr(config, "num_key_value_heads", None) or count
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention
        return Heads(count, key_count, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    size = getattr(config, "head_dim", None) or config.hidden_size // count
    return Heads(count, key_count, size, size)


def other_layers(config: "PreTrainedConfig") -> str | None:
    """
    What a model's layers have that is no causal attention over full, sliding or chunked windows; `None` if nothing.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.

    Returns:
        Such as "layers of type linear_attention".
    """
    if is_heterogeneous(config) and len({getattr(c, "sliding_window", None) for c in config.per_layer_config}) > 1:
        return "windows of several sizes"
    other = sorted(set(layer_types(config)) - set(layer_reaches(config)))
    if other:
        return f"layers of type {', '.join(other)}"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "attention that looks ahead"
    return None


def reach_of_layer(module: torch.nn.Module, sliding_window: int | None) -> Reach:
    """
    What a layer of attention sees.

    Args:
        module (`torch.nn.Module`):
            The layer, as it gives itself to its attention function.
        sliding_window (`int`, *optional*):
            The window that it gives to that function. Chunks are not given, but known from the layer's place.
    """
    if sliding_window is not None:
        return Reach(window=sliding_window)
    config, place = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = [] if config is None else layer_types(config)
    if place is not None and place < len(kinds) and kinds[place] == "chunked_attention":
        return Reach(chunk=getattr(config, "attention_chunk_size", None))
    return FULL_REACH


def leaves_out_softcap(implementation: str | None) -> bool:
    """Whether an attention of transformers leaves out the bound of scores that a model has (Gemma 2)."""
    return implementation == "sdpa"


def has_attention_dropout(config: "PreTrainedConfig") -> bool:
    """Whether training drops attention weights."""
    return bool(getattr(config, "attention_dropout", 0.0))


def without_adapter(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    """The model of transformers itself, where PEFT may stand around it."""
    return cast("PreTrainedModel", cast("PeftModel", model).get_base_model() if is_peft_model(model) else model)
