"""
Whether FlexAttention's kernels run on this card for a model, tried before a training depends on them.

What they need of a card's shared memory follows from head size and number type, and is known when they are compiled.
The backward kernel needs most, and it would fail in the middle of a step.
"""

from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from treepo_trl.model_support import Heads, Reach, layer_heads, layer_reaches, layer_types

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
    head = max(max(heads.size, heads.value_size) for heads in layer_heads(config))
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
    scores = Scores(softcap=getattr(config, "attn_logit_softcapping", None))
    module = torch.nn.Identity().train()
    try:
        for heads, reach in _kinds(config):
            query, key, value = (
                like.new_zeros(1, count, length, width, requires_grad=True)
                for count, width in (
                    (heads.count, heads.size),
                    (heads.key_count, heads.size),
                    (heads.key_count, heads.value_size),
                )
            )
            with torch.enable_grad():
                output = attention(module, query, key, value, LayerAttention(scores, reach))
                torch.autograd.grad(output, (query, key, value), torch.zeros_like(output))
    except Exception as error:
        said = [str(each) for each in _causes(error) if _is_out_of_resources(each)]
        if not said:
            raise
        return said[-1].strip().splitlines()[0]
    return None


def _kinds(config: PreTrainedConfig) -> list[tuple[Heads, Reach]]:
    """Heads and reach of each kind of attention layer, each pair once."""
    reaches, heads = layer_reaches(config), layer_heads(config)
    kinds = layer_types(config) or [next(iter(reaches))] * len(heads)
    return list(
        dict.fromkeys((each, reaches[kind]) for each, kind in zip(heads, kinds, strict=True) if kind in reaches)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def _is_out_of_resources(error: BaseException) -> bool:
    """Triton's `OutOfResources`, also in the words of the compiler that has met it."""
    return type(error).__name__ == "OutOfResources" or "out of resource" in str(error).lower()
