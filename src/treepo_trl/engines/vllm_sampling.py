"""What vLLM is asked for one segment, in this process and over HTTP, and entropies from what it answers."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .base import SamplingOptions


NUM_TOP_LOGPROBS = 20  # vLLM's default limit
_NO_PROBABILITY = -9999.0  # vLLM's JSON for minus infinity


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


def entropies_of_answer(content: list[dict[str, Any]]) -> list[float]:
    """
    Entropy of each token's distribution from the `top_logprobs` of an answer, the drawn token in front of the others.

    A drawn token that is not among the likeliest has taken the place of one that is: then it is the smallest, and
    counts with the rest.
    """
    tops = [[top["logprob"] for top in entry["top_logprobs"][:NUM_TOP_LOGPROBS]] for entry in content]
    values = np.array(tops, dtype=np.float64)
    values[values <= _NO_PROBABILITY] = -np.inf
    entropies = np.empty(len(values))
    drawn_is_smallest = values[:, 0] <= values.min(axis=1)
    for which, width in ((drawn_is_smallest, values.shape[1] - 1), (~drawn_is_smallest, values.shape[1])):
        descending = -np.sort(-values[which], axis=1)
        entropies[which] = entropies_of(descending[:, :width])
    return entropies.tolist()
