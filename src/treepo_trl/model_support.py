"""What a model's config says about its attention, for the transformers engine and for packed rows."""

from transformers import PreTrainedConfig


def other_layers(config: PreTrainedConfig) -> str | None:
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


def has_attention_dropout(config: PreTrainedConfig) -> bool:
    """Whether training drops attention weights."""
    return bool(getattr(config, "attention_dropout", 0.0))
