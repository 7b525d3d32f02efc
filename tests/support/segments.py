"""Completions segment by segment, and what `generate` and a full forward say about them."""

from typing import Any

import torch
from transformers import PreTrainedModel

from treepo_trl.engines import SamplingOptions, SegmentEngine, SegmentRequest, SegmentResult


EOS = 0
GREEDY = SamplingOptions(temperature=0.0)
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34], [7, 8, 9, 10, 40], [64] * 17]


def drain(engine: SegmentEngine, requests: list[SegmentRequest]) -> dict[int, SegmentResult]:
    """Results by request."""
    results = list(engine.complete(requests))
    assert len({result.request_id for result in results}) == len(results)
    return {result.request_id: result for result in results}


def complete(
    engine: SegmentEngine, prompts: list[list[int]], segment_length: int, num_tokens: int, eos: int = EOS
) -> tuple[list[list[int]], list[list[float]]]:
    """Completions of up to `num_tokens` tokens and their log-probabilities, segment by segment."""
    completions: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    while live:
        requests = [
            SegmentRequest(i, prompts[i] + completions[i], min(segment_length, num_tokens - len(completions[i])))
            for i in live
        ]
        for i, result in drain(engine, requests).items():
            completions[i] += result.token_ids
            logprobs[i] += result.logprobs
            assert len(result.token_ids) == len(result.logprobs)
        live = [i for i in live if completions[i][-1] != eos and len(completions[i]) < num_tokens]
    return completions, logprobs


def generated(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy completions of `generate`, one prompt at a time."""
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": 1}
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options)
        completions.append(output[0, len(prompt) :].tolist())
    return completions


def full_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """`(tokens, vocab)` of one forward over everything."""
    with torch.no_grad():
        return model(torch.tensor([token_ids], device=model.device)).logits[0].float().cpu()


def full_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probability of each token of a completion, by one forward over everything."""
    logprobs = full_logits(model, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
