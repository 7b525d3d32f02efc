"""Which engine samples from a `transformers` model of this process."""

import logging

from transformers import PreTrainedModel

from .base import SamplingOptions
from .forked_caches import ForkedCacheEngine
from .own_model import OwnModelEngine
from .transformers import TransformersEngine, why_no_slots


logger = logging.getLogger(__name__)


def engine_for_model(
    model: PreTrainedModel,
    eos_token_ids: list[int],
    options: SamplingOptions | None = None,
    with_entropies: bool = False,
) -> OwnModelEngine:
    """
    [`TransformersEngine`] where it can drive the model's layers, else [`ForkedCacheEngine`], which says why.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, with an adapter or without.
        eos_token_ids (`list[int]`), options ([`SamplingOptions`], *optional*), with_entropies (`bool`):
            As those engines take them.

    Raises:
        ValueError: if neither can sample from the model.
    """
    reason = why_no_slots(model)
    if reason is None:
        return TransformersEngine(model, eos_token_ids, options, with_entropies=with_entropies)
    logger.warning(
        f"The model has {reason}: the transformers engine copies a path's whole state to each of its children, and "
        "decodes paths of one length together."
    )
    return ForkedCacheEngine(model, eos_token_ids, options, with_entropies=with_entropies)
