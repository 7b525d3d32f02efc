"""How the transformers engine draws: distribution, log-probabilities and entropies, against transformers itself."""

import math
from dataclasses import asdict

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.models import make_model
from tests.support.segments import EOS, PROMPTS, complete, drain, full_logits
from treepo_trl.engines import SamplingOptions, SegmentRequest
from treepo_trl.engines.transformers import TransformersEngine


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.6),
        SamplingOptions(temperature=1.7, top_k=5),
        SamplingOptions(top_p=0.8),
        SamplingOptions(min_p=0.1),
        SamplingOptions(repetition_penalty=1.5),
        SamplingOptions(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_processed_distribution(model: PreTrainedModel, options: SamplingOptions) -> None:
    """At every sampled token the log-softmax of the scores that `generate` would draw from."""
    engine = TransformersEngine(model, [EOS], options)
    prompts = [[5, 6, 7], [30, 31, 32, 33, 34, 35]]
    completions, logprobs = complete(engine, prompts, 3, 8)
    for prompt, completion, values in zip(prompts, completions, logprobs, strict=True):
        for i, (token, value) in enumerate(zip(completion, values, strict=True)):
            ids = torch.tensor([prompt + completion[:i]])
            with torch.no_grad():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=1,
                    do_sample=True,
                    **asdict(options),
                    output_scores=True,
                    return_dict_in_generate=True,
                    pad_token_id=1,
                )
            assert value == pytest.approx(output.scores[0][0].log_softmax(-1)[token].item(), abs=1e-4)
            assert math.isfinite(value)


@pytest.mark.parametrize(
    "options",
    [SamplingOptions(), SamplingOptions(temperature=0.5), SamplingOptions(top_k=3), SamplingOptions(top_p=0.7)],
    ids=str,
)
def test_frequencies_are_the_probabilities(options: SamplingOptions) -> None:
    """Chi-square of 4000 first tokens over a vocabulary of 8; below 29.9 with probability 0.9999 at 7 degrees."""
    model = make_model(vocab_size=8).eval()
    prompt = [5, 2, 7]
    engine = TransformersEngine(model, [EOS], options)
    results = drain(engine, [SegmentRequest(i, prompt, 1) for i in range(4000)]).values()
    counts = torch.bincount(torch.tensor([result.token_ids[0] for result in results]), minlength=8)
    logits = full_logits(model, prompt)[-1] / options.temperature
    probabilities = logits.softmax(-1)
    if options.top_k:
        probabilities[probabilities < probabilities.topk(options.top_k).values[-1]] = 0
    if options.top_p < 1:
        values, order = probabilities.sort(descending=True)
        probabilities[order[values.cumsum(0) - values >= options.top_p]] = 0
    probabilities /= probabilities.sum()
    assert (counts[probabilities == 0] == 0).all()
    expected = 4000 * probabilities[probabilities > 0]
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item()
    assert len(expected) > 1
    assert statistic < 29.9


def test_same_torch_seed_same_segments(model: PreTrainedModel) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(complete(TransformersEngine(model, [EOS]), PROMPTS, 4, 12))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_entropies_are_those_of_the_sampling_distribution(model: PreTrainedModel) -> None:
    options = SamplingOptions(temperature=0.7, top_k=5)
    engine = TransformersEngine(model, [EOS], options, with_entropies=True)
    assert engine.reports_entropies
    prompt = [7, 8, 9]
    result = drain(engine, [SegmentRequest(0, prompt, 6)])[0]
    assert result.entropies is not None
    assert len(result.entropies) == len(result.token_ids)
    logits = full_logits(model, prompt + result.token_ids[:-1])[len(prompt) - 1 :] / 0.7
    top = logits.topk(5, dim=-1).values.log_softmax(-1)  # what top_k leaves
    expected = -(top.exp() * top).sum(-1)
    torch.testing.assert_close(torch.tensor(result.entropies), expected, atol=1e-4, rtol=1e-4)
    assert drain(TransformersEngine(model, [EOS]), [SegmentRequest(0, prompt, 2)])[0].entropies is None
