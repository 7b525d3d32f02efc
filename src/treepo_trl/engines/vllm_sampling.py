"""What vLLM is asked for one segment, in this process and over HTTP, and entropies from what it answers."""

from collections.abc import Iterable, Mapping

import numpy as np

from .base import SamplingOptions


NUM_TOP_LOGPROBS = 20  # vLLM's default limit


def sampling_fields(
    options: SamplingOptions,
    eos_token_ids: Iterable[int],
    generation_kwargs: Mapping[str, object],
    with_entropies: bool,
) -> dict[str, object]:
    """Fields of [`vllm.SamplingParams`] but `max_tokens`. `generation_kwargs` win over `options`."""
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p or 0.0,
        "repetition_penalty": options.repetition_penalty,
        # With 0 only the sampled token's.
        "logprobs": NUM_TOP_LOGPROBS if with_entropies else 0,
        "stop_token_ids": sorted(eos_token_ids),
        "ignore_eos": True,  # `eos_token_ids` alone decide, not the model's configuration
        "detokenize": False,
        **generation_kwargs,
    }


def entropies_of(top_logprobs: np.ndarray) -> np.ndarray:
    """
    Entropy in nats of each row's distribution, given its largest log-probabilities (rows, K), largest first.

    Exact if the K tokens hold all the probability. The rest counts as if each of its tokens were as likely as the
    K-th, which is the most likely that they can be: a lower bound.
    """
    probabilities = np.exp(top_logprobs)
    finite = np.where(np.isfinite(top_logprobs), top_logprobs, 0.0)  # 0 * -inf is no number
    rest = np.clip(1.0 - probabilities.sum(axis=1), 0.0, 1.0)
    return -(probabilities * finite).sum(axis=1) - rest * finite[:, -1]
