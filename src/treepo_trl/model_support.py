"""Which models the transformers engine and the packed row can serve, from their configs."""

from typing import Any

from transformers import AttentionInterface


_ALIBI = "it has ALiBi biases, which count packed positions instead of depths"
_RECURRENT = "it is recurrent"
_WINDOW = "it has attention windows that count packed positions instead of depths"
_ABSOLUTE = "its absolute positions make plain rows depend on their padding, which a packed row has not"
_UNPACKABLE_MODELS = {
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "jamba", "falcon_mamba", "recurrent_gemma", "xlstm"), _RECURRENT),
    **dict.fromkeys(("gpt_neo", "doge"), _WINDOW),
    "gpt_oss": "it has attention sinks",
    **dict.fromkeys(("gpt2", "gpt_bigcode", "biogpt", "xglm", "ctrl"), _ABSOLUTE),
}


def other_layers(config: Any) -> str | None:
    """
    What a model has beside full attention, such as "a sliding window of 4096 tokens"; `None` if nothing.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.
    """
    layer_types = getattr(config, "layer_types", None) or []  # of some models a property
    other = sorted(set(layer_types) - {"full_attention"})
    if other:
        return f"layers of type {', '.join(other)}"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and not layer_types:
        return f"a sliding window of {window} tokens"
    return None


def has_attention_dropout(config: Any) -> bool:
    """Whether training drops attention weights."""
    return bool(getattr(config, "attention_dropout", 0.0))


def why_not_packable(config: Any) -> str | None:
    """
    Why a tree mask cannot serve a model; `None` if it can.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.
    """
    attention = config._attn_implementation
    if attention != "eager" and attention not in AttentionInterface():
        return f"its attention is {attention!r} (load it with `attn_implementation='sdpa'`)"
    other = other_layers(config)
    if other is not None:
        return f"it has {other}"
    if getattr(config, "alibi", False):
        return _ALIBI
    return _UNPACKABLE_MODELS.get(config.model_type)
