"""The transformers engine against `generate`: segments, their ends, changed weights, limits."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.support.models import make_model
from tests.support.segments import EOS, GREEDY, PROMPTS, complete, drain, full_logits, full_logprobs, generated
from treepo_trl.engines import SegmentEngineError, SegmentRequest
from treepo_trl.engines.transformers import TransformersEngine


@pytest.mark.parametrize("segment_length", [1, 2, 3, 7, 20])
def test_greedy_segments_are_those_of_generate(model: PreTrainedModel, segment_length: int) -> None:
    engine = TransformersEngine(model, [EOS], GREEDY)
    completions, _ = complete(engine, PROMPTS, segment_length, 20)
    assert completions == generated(model, PROMPTS, 20)


@pytest.mark.parametrize(
    ("most_batch_tokens", "most_cached_tokens"), [(1, None), (60, None), (None, 0), (None, 20), (30, 10)]
)
def test_small_limits_change_no_result(
    model: PreTrainedModel, most_batch_tokens: int | None, most_cached_tokens: int | None
) -> None:
    engine = TransformersEngine(model, [EOS], GREEDY, most_batch_tokens, most_cached_tokens)
    completions, _ = complete(engine, PROMPTS * 2, 3, 20)
    assert completions == generated(model, PROMPTS, 20) * 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_model_is_left_as_it_was(attention: str) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    model.eval()
    before = full_logits(model, PROMPTS[1])
    engine = TransformersEngine(model, [EOS], GREEDY)
    assert complete(engine, PROMPTS, 3, 8)[0] == generated(model, PROMPTS, 8)
    assert model.config._attn_implementation == attention
    assert torch.equal(full_logits(model, PROMPTS[1]), before)


# The end of a segment


@pytest.mark.parametrize("places", [[5], [5, 2], [0]])
def test_the_first_eos_ends_a_segment(model: PreTrainedModel, places: list[int]) -> None:
    tokens = generated(model, PROMPTS[:1], 12)[0]
    eos = [tokens[place] for place in places]
    length = min(map(tokens.index, eos)) + 1
    for max_tokens in (12, length):  # it may be the last token that was asked for
        engine = TransformersEngine(model, [98, *eos], GREEDY)
        result = drain(engine, [SegmentRequest(0, PROMPTS[0], max_tokens)])[0]
        assert (result.token_ids, result.finish_reason) == (tokens[:length], "stop")


# Control


def test_abort_drops_everything(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [EOS], GREEDY, max_batch_tokens=20)
    engine.submit([SegmentRequest(i, PROMPTS[1], 2 + i) for i in range(8)])
    engine.collect()
    engine.abort()
    assert engine.collect() == []
    assert complete(engine, PROMPTS, 3, 12)[0] == generated(model, PROMPTS, 12)


def test_reset_between_segments_changes_no_result(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [EOS], GREEDY)
    engine.submit([SegmentRequest(0, PROMPTS[1], 3), SegmentRequest(1, PROMPTS[3], 9)])
    (first,) = engine.collect()
    engine.reset_prefix_cache()  # with a row still running
    engine.submit([SegmentRequest(2, PROMPTS[1] + first.token_ids, 6)])
    results = {}
    while len(results) < 2:
        results.update({r.request_id: r for r in engine.collect()})
    expected = generated(model, [PROMPTS[1], PROMPTS[3]], 9)
    assert first.token_ids + results[2].token_ids == expected[0]
    assert results[1].token_ids == expected[1]


@pytest.mark.parametrize("change", ["optimizer", "in place", "load_state_dict"])
def test_changed_weights_forget_the_cache(model: PreTrainedModel, change: str) -> None:
    engine = TransformersEngine(model, [99], GREEDY)
    drain(engine, [SegmentRequest(0, PROMPTS[1], 6)])
    before = generated(model, [PROMPTS[1]], 6)
    if change == "optimizer":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
        model(torch.tensor([PROMPTS[1]])).logits[0, -1, 12].backward()
        optimizer.step()
        optimizer.zero_grad()
    elif change == "in place":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1)
    else:
        torch.manual_seed(5)
        model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    result = drain(engine, [SegmentRequest(1, PROMPTS[1], 6)])[1]
    assert result.token_ids == generated(model, [PROMPTS[1]], 6)[0]
    assert before[0] != result.token_ids
    assert result.logprobs == pytest.approx(
        drain(TransformersEngine(model, [99], GREEDY), [SegmentRequest(0, PROMPTS[1], 6)])[0].logprobs, abs=1e-5
    )


def test_peft_model(model: PreTrainedModel) -> None:
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    engine = TransformersEngine(wrapped, [EOS], GREEDY)
    adapted = complete(engine, PROMPTS, 3, 12)[0]
    assert adapted == generated(wrapped, PROMPTS, 12)
    engine.reset_prefix_cache()
    with wrapped.disable_adapter():
        base = complete(engine, PROMPTS, 3, 12)[0]
        assert base == generated(wrapped, PROMPTS, 12)
    assert base != adapted


@pytest.mark.parametrize("cls", ["bfloat16", "float16"])
def test_half_precision_runs(cls: str) -> None:
    model = make_model().to(getattr(torch, cls)).eval()
    completions, logprobs = complete(TransformersEngine(model, [EOS]), PROMPTS, 3, 9)
    assert all(math.isfinite(value) and value <= 0 for row in logprobs for value in row)
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=True):
        expected = full_logprobs(model, prompt, completion)
        assert (torch.tensor(values) - expected).abs().mean() < 0.1


# Counts, limits and refusals


def test_tokens_of_requests_are_counted_and_those_computed_once(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [], GREEDY)
    drain(engine, [SegmentRequest(i, [5] * 10, 3) for i in range(4)])
    # The last token of a request is fed while decoding: 9 each, computed once for all four.
    assert (engine.num_prompt_tokens, engine.num_prefilled_tokens, engine.num_cached_tokens) == (36, 9, 27)


def test_limits_follow_from_the_model_and_the_token_budget(model: PreTrainedModel) -> None:
    assert TransformersEngine(make_model(max_position_embeddings=77), [EOS]).context_length == 77
    engine = TransformersEngine(model, [EOS], max_batch_tokens=100)
    assert [engine.num_slots(length) for length in (1, 10, 33, 100, 500)] == [100, 10, 3, 1, 1]
    assert engine.num_slots(0) is None  # nothing is known about the requests yet


@pytest.mark.parametrize("token", [-1, 65, 10_000])
def test_a_token_that_the_model_does_not_have_names_the_request(model: PreTrainedModel, token: int) -> None:
    engine = TransformersEngine(model, [EOS])
    with pytest.raises(SegmentEngineError, match="vocabulary of 65") as error:
        engine.submit([SegmentRequest(3, [1, 2], 4), SegmentRequest(4, [1, token], 4)])
    assert error.value.request_id == 4
