"""
Whether FlexAttention's kernels run on this card for a model, tried before a training depends on them.

What they need of a card's shared memory follows from head size and number type, and is known when they are compiled.
The backward kernel needs most, and it would fail in the middle of a step.
"""

from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from treepo_trl.model_support import layer_reaches

from .block_attention import Scores
from .tree_attention import LayerAttention, TreeAttention


MIN_SHARED_MEMORY = 160 * 1024
"""Bytes of shared memory per block that serve any head: data-centre cards have them."""
MIN_SHARED_MEMORY_OF_SMALL_HEADS = 99 * 1024
"""What consumer cards have from sm_86 on."""
LARGEST_SMALL_HEAD = 128
"""Largest head that these serve. Larger ones ask for more in the backward pass (pytorch/pytorch#133254)."""


def why_too_small(shared_memory: int, config: PreTrainedConfig) -> str | None:
    """
    Why FlexAttention may not fit a card; `None` if it does.

    Args:
        shared_memory (`int`):
            The card's bytes of shared memory per block.
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model.
    """
    head = max(_head_sizes(config))
    needed = MIN_SHARED_MEMORY_OF_SMALL_HEADS if head <= LARGEST_SMALL_HEAD else MIN_SHARED_MEMORY
    if shared_memory >= needed:
        return None
    return f"FlexAttention may need more shared memory than this card has, with heads of {head} dimensions"


def why_flex_fails(attention: TreeAttention, length: int, config: PreTrainedConfig, like: torch.Tensor) -> str | None:
    """
    Forward and backward pass of one layer of each kind; why the card cannot run them, `None` if it can.

    Args:
        attention ([`TreeAttention`]):
            That of a packed row, for `flex`.
        length (`int`):
            Positions of the row.
        config ([`~transformers.PreTrainedConfig`]):
            The text config of the model, which has the shapes.
        like (`torch.Tensor`):
            Has the device and the number type that the layers compute in.
    """
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size, value_size = _head_sizes(config)
    query, key, value = (
        like.new_zeros(1, count, length, width, requires_grad=True)
        for count, width in ((heads, size), (key_heads, size), (key_heads, value_size))
    )
    scores = Scores(softcap=getattr(config, "attn_logit_softcapping", None))
    module = torch.nn.Identity().train()
    try:
        for reach in layer_reaches(config).values():
            with torch.enable_grad():
                output = attention(module, query, key, value, LayerAttention(scores, reach))
                torch.autograd.grad(output, (query, key, value), torch.zeros_like(output))
    except Exception as error:
        said = [str(each) for each in _causes(error) if _is_out_of_resources(each)]
        if not said:
            raise
        return said[-1].strip().splitlines()[0]
    return None


def _head_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Dimensions of a head of queries and keys, and of values."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return size, size


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def _is_out_of_resources(error: BaseException) -> bool:
    """Triton's `OutOfResources`, also in the words of the compiler that has met it."""
    return type(error).__name__ == "OutOfResources" or "out of resource" in str(error).lower()
