"""The transformers engine against `generate`, full forwards and transformers' own logits processors."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from tests.support.models import make_model
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SamplingOptions, SegmentEngineError, SegmentRequest, SegmentResult
from treepo_trl.engines.row_states import Block, BlockCache
from treepo_trl.engines.transformers import TransformersEngine


EOS = 0
GREEDY = SamplingOptions(temperature=0.0)
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34], [7, 8, 9, 10, 40], [64] * 17]


def drain(engine: TransformersEngine, requests: list[SegmentRequest]) -> dict[int, SegmentResult]:
    """Submit, and collect until all are there."""
    engine.submit(requests)
    results: dict[int, SegmentResult] = {}
    while len(results) < len(requests):
        new = engine.collect()
        assert new, "collect() must return what it blocks for"
        for result in new:
            assert result.request_id not in results
            results[result.request_id] = result
    return results


def complete(
    engine: TransformersEngine, prompts: list[list[int]], segment_length: int, num_tokens: int, eos: int = EOS
) -> tuple[list[list[int]], list[list[float]]]:
    """Completions of up to `num_tokens` tokens, segment by segment."""
    completions: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    live, request_id = list(range(len(prompts))), 0
    while live:
        requests, owners = [], {}
        for i in live:
            max_tokens = min(segment_length, num_tokens - len(completions[i]))
            requests.append(SegmentRequest(request_id, prompts[i] + completions[i], max_tokens))
            owners[request_id] = i
            request_id += 1
        for result in drain(engine, requests).values():
            i = owners[result.request_id]
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
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=1,
            )
        completions.append(output[0, len(prompt) :].tolist())
    return completions


def full_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model().eval()


# Greedy


@pytest.mark.parametrize("segment_length", [1, 2, 3, 7, 20])
def test_greedy_segments_are_those_of_generate(model: PreTrainedModel, segment_length: int) -> None:
    engine = TransformersEngine(model, [EOS], GREEDY)
    completions, _ = complete(engine, PROMPTS, segment_length, 20)
    assert completions == generated(model, PROMPTS, 20)


@pytest.mark.parametrize(
    "limits", [{"max_batch_tokens": 1}, {"max_batch_tokens": 60}, {"max_cached_tokens": 0}, {"max_cached_tokens": 20},
               {"max_batch_tokens": 30, "max_cached_tokens": 10}], ids=str
)  # fmt: skip
def test_small_limits_change_no_result(model: PreTrainedModel, limits: dict[str, int]) -> None:
    engine = TransformersEngine(model, [EOS], GREEDY, **limits)
    completions, _ = complete(engine, PROMPTS * 2, 3, 20)
    assert completions == generated(model, PROMPTS, 20) * 2


def tiny(config_class: type, **changes: Any) -> PreTrainedModel:
    common = {"vocab_size": 65, "eos_token_id": EOS, "pad_token_id": 1, "bos_token_id": None, "initializer_range": 0.3}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    config = config_class(**{**common, **(changes.pop("sizes", sizes)), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


MULTI_HEAD_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: tiny(LlamaConfig),
    "mistral": lambda: tiny(MistralConfig, sliding_window=None),
    "qwen3": lambda: tiny(Qwen3Config, head_dim=16),
    "gemma": lambda: tiny(GemmaConfig, head_dim=16),
    "phi3": lambda: tiny(Phi3Config),
    "gpt2": lambda: tiny(GPT2Config, sizes=GPT_SIZES),
    "gpt_neox": lambda: tiny(GPTNeoXConfig, sizes=MULTI_HEAD_SIZES),
    "multi_query": lambda: tiny(LlamaConfig, num_key_value_heads=1),
    "multi_head": lambda: tiny(LlamaConfig, num_key_value_heads=4),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_agree_with_a_full_forward(name: str) -> None:
    model = ARCHITECTURES[name]()
    engine = TransformersEngine(model, [EOS], SamplingOptions())
    completions, logprobs = complete(engine, PROMPTS, 3, 12)
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=True):
        expected = full_logits(model, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


UNUSUAL: dict[str, Any] = {
    "gptj": lambda: tiny(GPTJConfig, sizes={**GPT_SIZES, "rotary_dim": 4}),
    "bloom": lambda: tiny(BloomConfig, sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": lambda: tiny(MptConfig, sizes={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "falcon_alibi": lambda: tiny(FalconConfig, sizes=MULTI_HEAD_SIZES, alibi=True, new_decoder_architecture=False),
    "falcon": lambda: tiny(FalconConfig, sizes=MULTI_HEAD_SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "gemma2": lambda: tiny(Gemma2Config, head_dim=8),
    "mamba": lambda: tiny(MambaConfig, sizes={"hidden_size": 32, "num_hidden_layers": 2}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_architectures_are_right_or_refused(name: str) -> None:
    """Attention of their own, ALiBi, softcapping, no attention at all: never wrong numbers without an error."""
    model = UNUSUAL[name]()
    try:
        engine = TransformersEngine(model, [EOS], SamplingOptions())
        completions, logprobs = complete(engine, PROMPTS[:4], 3, 9)
    except ValueError as error:
        if "use_vllm" not in str(error):
            raise
        return
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=False):
        expected = full_logits(model, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


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


# Distribution


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
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    min_p=options.min_p,
                    repetition_penalty=options.repetition_penalty,
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


def test_second_tokens_follow_their_own_first(model: PreTrainedModel) -> None:
    """Joint frequencies of two tokens, with a segment boundary in between: children continue their own parent."""
    model = make_model(vocab_size=4, initializer_range=0.1).eval()
    prompt = [3, 2]
    engine = TransformersEngine(model, [99], SamplingOptions())
    first = [r.token_ids for r in drain(engine, [SegmentRequest(i, prompt, 1) for i in range(3000)]).values()]
    second = drain(engine, [SegmentRequest(i, prompt + ids, 1) for i, ids in enumerate(first)])
    counts = torch.zeros(4, 4)
    for i, ids in enumerate(first):
        counts[ids[0], second[i].token_ids[0]] += 1
    p_first = full_logits(model, prompt)[-1].softmax(-1)
    p_second = torch.stack([full_logits(model, [*prompt, token])[-1].softmax(-1) for token in range(4)])
    expected = 3000 * p_first[:, None] * p_second
    assert expected.min() > 3
    assert ((counts - expected) ** 2 / expected).sum().item() < 44.3  # 0.9999 at 15 degrees of freedom


def test_same_torch_seed_same_segments(model: PreTrainedModel) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(complete(TransformersEngine(model, [EOS]), PROMPTS, 4, 12))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


# Rows and the cache


def test_forks_reuse_the_prompt(model: PreTrainedModel) -> None:
    """Six requests for one prompt of 7 tokens prefill 6: the last token is fed with the first decoding step."""
    engine = TransformersEngine(model, [99])
    prompt = PROMPTS[1]
    results = drain(engine, [SegmentRequest(i, prompt, 4) for i in range(6)])
    assert engine.num_prefilled_tokens == 6
    children = [SegmentRequest(2 * i + j, prompt + results[i].token_ids, 4) for i in range(6) for j in range(2)]
    grandchildren = drain(engine, children)
    assert engine.num_prefilled_tokens == 6
    drain(
        engine,
        [
            SegmentRequest(r.request_id, children[r.request_id].token_ids + r.token_ids, 3)
            for r in grandchildren.values()
        ],
    )
    assert engine.num_prefilled_tokens == 6
    # From the middle of a segment the tokens behind the last boundary are computed, and no more.
    drain(engine, [SegmentRequest(0, prompt + results[0].token_ids[:2], 1)])
    assert engine.num_prefilled_tokens <= 6 + 2


def test_prompt_is_kept_for_a_later_request(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [99])
    drain(engine, [SegmentRequest(0, PROMPTS[1], 2)])
    drain(engine, [SegmentRequest(1, PROMPTS[1], 2), SegmentRequest(2, PROMPTS[1], 5)])
    assert engine.num_prefilled_tokens == 6
    engine.reset_prefix_cache()
    drain(engine, [SegmentRequest(3, PROMPTS[1], 2)])
    assert engine.num_prefilled_tokens == 12


def test_forks_of_one_path_differ_and_keep_their_own_states(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [99])
    prompt = PROMPTS[3]
    first = drain(engine, [SegmentRequest(i, prompt, 5) for i in range(8)])
    assert len({tuple(r.token_ids) for r in first.values()}) > 1
    second = drain(engine, [SegmentRequest(i, prompt + first[i // 2].token_ids, 5) for i in range(16)])
    for i in range(16):
        path = prompt + first[i // 2].token_ids + second[i].token_ids
        expected = full_logits(model, path)[-6:-1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(second[i].token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(second[i].logprobs), expected, atol=1e-4, rtol=1e-4)


def test_results_do_not_depend_on_other_rows(model: PreTrainedModel) -> None:
    alone = drain(TransformersEngine(model, [EOS], GREEDY), [SegmentRequest(0, PROMPTS[1], 9)])[0]
    engine = TransformersEngine(model, [EOS], GREEDY)
    # Others of all lengths, some done long before, and one that joins while it runs.
    engine.submit([SegmentRequest(10 + i, prompt, 1 + 3 * i) for i, prompt in enumerate(PROMPTS)])
    engine.submit([SegmentRequest(0, PROMPTS[1], 9)])
    results = {r.request_id: r for r in engine.collect()}
    engine.submit([SegmentRequest(50, [9, 9, 9, 9], 12)])
    while len(results) < 8:
        results.update({r.request_id: r for r in engine.collect()})
    assert results[0].token_ids == alone.token_ids
    assert results[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert results[50].token_ids == generated(model, [[9, 9, 9, 9]], 12)[0]


def test_a_long_request_joins_a_running_batch(model: PreTrainedModel) -> None:
    """The storage grows in both directions while rows are running."""
    engine = TransformersEngine(model, [EOS], GREEDY)
    engine.submit([SegmentRequest(0, [5], 2), SegmentRequest(1, [6, 7], 25)])
    results = {r.request_id: r for r in engine.collect()}
    long = [(3 * i) % 60 + 5 for i in range(100)]
    engine.submit([SegmentRequest(i, long[: 100 - i], 20) for i in range(2, 8)])
    while len(results) < 8:
        results.update({r.request_id: r for r in engine.collect()})
    expected = generated(model, [[5]], 2) + generated(model, [[6, 7]], 25)
    expected += generated(model, [long[: 100 - i] for i in range(2, 8)], 20)
    assert [results[i].token_ids for i in range(8)] == expected


# The end of a segment


def test_eos_ends_a_segment(model: PreTrainedModel) -> None:
    tokens = complete(TransformersEngine(model, [99], GREEDY), [PROMPTS[0]], 12, 12, eos=99)[0][0]
    eos = tokens[5]
    result = drain(TransformersEngine(model, [eos], GREEDY), [SegmentRequest(0, PROMPTS[0], 12)])[0]
    assert result.token_ids == tokens[: tokens.index(eos) + 1]
    assert result.finish_reason == "stop"
    several = drain(TransformersEngine(model, [98, eos, tokens[2]], GREEDY), [SegmentRequest(0, PROMPTS[0], 12)])[0]
    assert several.token_ids == tokens[: min(tokens.index(eos), tokens.index(tokens[2])) + 1]
    first = drain(TransformersEngine(model, [tokens[0]], GREEDY), [SegmentRequest(0, PROMPTS[0], 12)])[0]
    assert (first.token_ids, first.finish_reason) == (tokens[:1], "stop")


def test_length_ends_a_segment(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [99], GREEDY)
    results = drain(engine, [SegmentRequest(i, PROMPTS[0], i) for i in range(1, 6)])
    for i in range(1, 6):
        assert len(results[i].token_ids) == i
        assert results[i].finish_reason == "length"


def test_eos_on_the_last_token_is_a_stop(model: PreTrainedModel) -> None:
    tokens = complete(TransformersEngine(model, [99], GREEDY), [PROMPTS[3]], 6, 6, eos=99)[0][0]
    length = tokens.index(tokens[3]) + 1
    result = drain(TransformersEngine(model, [tokens[3]], GREEDY), [SegmentRequest(0, PROMPTS[3], length)])[0]
    assert (len(result.token_ids), result.finish_reason) == (length, "stop")


# Control


def test_abort_drops_everything(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [EOS], GREEDY, max_batch_tokens=20)
    engine.submit([SegmentRequest(i, PROMPTS[1], 2 + i) for i in range(8)])
    engine.collect()
    engine.abort()
    assert engine.collect() == []
    assert complete(engine, PROMPTS, 3, 12)[0] == generated(model, PROMPTS, 12)


def test_collect_without_requests_returns_nothing(model: PreTrainedModel) -> None:
    assert TransformersEngine(model, [EOS]).collect() == []


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
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    engine = TransformersEngine(wrapped, [EOS], GREEDY)
    adapted = complete(engine, PROMPTS, 3, 12)[0]
    assert adapted == generated(wrapped, PROMPTS, 12)
    engine.reset_prefix_cache()
    with wrapped.disable_adapter():
        base = complete(engine, PROMPTS, 3, 12)[0]
        assert base == generated(wrapped, PROMPTS, 12)
    assert base != adapted


def test_training_state_has_no_gradients(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [EOS])
    drain(engine, [SegmentRequest(0, PROMPTS[1], 3)])
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cls", ["bfloat16", "float16"])
def test_half_precision_runs(cls: str) -> None:
    model = make_model().to(getattr(torch, cls)).eval()
    completions, logprobs = complete(TransformersEngine(model, [EOS]), PROMPTS, 3, 9)
    assert all(math.isfinite(value) and value <= 0 for row in logprobs for value in row)
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=True):
        expected = full_logits(model, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert (torch.tensor(values) - expected).abs().mean() < 0.1


# Refusals


def test_sliding_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)full attention in every layer.*sliding.*use_vllm=True"):
        TransformersEngine(make_model(use_sliding_window=True, sliding_window=8, max_window_layers=0), [EOS])
    with pytest.raises(ValueError, match=r"sliding window of 16 tokens"):
        TransformersEngine(tiny(MistralConfig, sliding_window=16), [EOS])


def test_unused_sliding_window_is_no_obstacle() -> None:
    model = make_model(use_sliding_window=False, sliding_window=8).eval()
    assert complete(TransformersEngine(model, [EOS], GREEDY), PROMPTS, 5, 12)[0] == generated(model, PROMPTS, 12)


def test_context_length_is_the_models() -> None:
    assert TransformersEngine(make_model(max_position_embeddings=77), [EOS]).context_length == 77


# Entropies, counts and limits


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


def test_tokens_of_requests_are_counted_and_those_computed_once(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [], GREEDY)
    drain(engine, [SegmentRequest(i, [5] * 10, 3) for i in range(4)])
    # The last token of a request is fed while decoding: 9 each, computed once for all four.
    assert (engine.num_prompt_tokens, engine.num_prefilled_tokens, engine.num_cached_tokens) == (36, 9, 27)


def test_slots_follow_from_the_token_budget(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [EOS], max_batch_tokens=100)
    assert [engine.num_slots(length) for length in (1, 10, 33, 100, 500)] == [100, 10, 3, 1, 1]
    assert engine.num_slots(0) is None  # nothing is known about the requests yet


@pytest.mark.parametrize("token", [-1, 65, 10_000])
def test_a_token_that_the_model_does_not_have_names_the_request(model: PreTrainedModel, token: int) -> None:
    engine = TransformersEngine(model, [EOS])
    with pytest.raises(SegmentEngineError, match="vocabulary of 65") as error:
        engine.submit([SegmentRequest(3, [1, 2], 4), SegmentRequest(4, [1, token], 4)])
    assert error.value.request_id == 4


# What is kept


def block_texts(cache: BlockCache) -> set[tuple[int, ...]]:
    """Token ids from the beginning up to the end of every block that is found from the root."""
    found, stack = set(), [((), cache.root)]
    while stack:
        before, block = stack.pop()
        for child in block.children:
            text = (*before, *child.token_ids)
            found.add(text)
            stack.append((text, child))
    return found


def keep(cache: BlockCache, *parts: list[int]) -> Block:
    block = cache.root
    for part in parts:
        block = cache.keep(block, part, torch.zeros(1, 2, 1, len(part), 1))
    return block


def test_the_least_recently_used_leaves_are_dropped_first() -> None:
    cache = BlockCache(max_tokens=12)
    keep(cache, [1, 1], [2, 2])
    keep(cache, [3, 3], [4, 4])
    cache.find([1, 1, 2, 2], 4)  # used again: 3-4 is the oldest now
    keep(cache, [5, 5], [6, 6])  # 12 tokens: all of them fit
    assert cache.num_tokens == 12
    keep(cache, [7])  # 13 are too many: down to 9, and 4-4, the leaf that was used longest ago, goes; then 3-3
    assert block_texts(cache) == {(1, 1), (1, 1, 2, 2), (5, 5), (5, 5, 6, 6), (7,)}
    assert cache.num_tokens == 9


def test_a_dropped_block_comes_back_with_its_child() -> None:
    cache = BlockCache(max_tokens=8)
    held = keep(cache, [1, 1], [2, 2])  # a request in flight holds this one
    keep(cache, [3] * 7)
    assert block_texts(cache) == set()  # 7 tokens are above three quarters of 8 too
    child = cache.keep(held, [9], torch.zeros(1, 2, 1, 1, 1))
    assert block_texts(cache) == {(1, 1), (1, 1, 2, 2), (1, 1, 2, 2, 9)}
    assert cache.num_tokens == 5
    assert cache.find([1, 1, 2, 2, 9, 4], 5) is child


def test_a_block_is_kept_once() -> None:
    cache = BlockCache(max_tokens=None)
    assert keep(cache, [1, 2]) is keep(cache, [1, 2])
    assert cache.num_tokens == 2
    cache.clear()
    assert block_texts(cache) == set()
    assert cache.num_tokens == 0


def test_a_request_from_before_a_reset_leaves_nothing_in_the_new_cache() -> None:
    cache = BlockCache(max_tokens=100)
    old = keep(cache, [1, 1], [2, 2])
    cache.clear()
    child = cache.keep(old, [3], torch.zeros(1, 2, 1, 1, 1))
    assert [block.token_ids for block in child.chain()] == [[3], [2, 2], [1, 1]]  # the request still has its states
    assert cache.num_tokens == 0
    assert block_texts(cache) == set()


def test_a_block_that_is_kept_again_counts_as_used() -> None:
    cache = BlockCache(max_tokens=8)
    keep(cache, [1] * 4)
    keep(cache, [2] * 4)
    keep(cache, [1] * 4)  # there already
    keep(cache, [3] * 2)  # 10 are too many: down to 6
    assert block_texts(cache) == {(1,) * 4, (3, 3)}


def test_the_storage_never_has_more_tokens_than_the_batch_may(model: PreTrainedModel) -> None:
    """Many short rows, then few long ones: rows and length that were needed at different times do not multiply."""
    engine = TransformersEngine(model, [], max_batch_tokens=200)
    largest = []
    reserve = engine._reserve

    def recording_reserve(num_rows: int, length: int) -> torch.Tensor:
        storage = reserve(num_rows, length)
        largest.append(storage.size(2) * storage.size(4))
        return storage

    engine._reserve = recording_reserve
    drain(engine, [SegmentRequest(i, [5 + i], 3) for i in range(40)])
    drain(engine, [SegmentRequest(i, [5 + i] * 60, 3) for i in range(6)])
    drain(engine, [SegmentRequest(i, [5 + i] * 2, 3) for i in range(40)])
    assert max(largest) <= 200
    assert max(largest) > 100
    engine.reset_prefix_cache()
    assert engine._storage is None


def test_the_batch_and_its_prefill_keep_to_the_token_budget(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [], max_batch_tokens=100)
    shapes = []
    forward = engine._forward

    def recording_forward(rows: slice, input_ids: torch.Tensor, positions: torch.Tensor, logits: bool) -> Any:
        shapes.append((rows.stop, int(positions.max()) + 1))
        return forward(rows, input_ids, positions, logits)

    engine._forward = recording_forward
    results = drain(engine, [SegmentRequest(i, [5 + i] * (3 + i), 4) for i in range(20)])
    assert len(results) == 20
    assert all(rows * length <= 100 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) > 3


def test_what_finished_is_freed(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [EOS], max_batch_tokens=200, max_cached_tokens=150)
    config = TreeSamplingConfig(num_generations=4, max_completion_length=16, segment_length=4, stop_repetition=False)
    sampler = TreeSampler(engine, config, [EOS])
    trees = sampler.sample([[5 + i] * 10 for i in range(12)], seed=0)
    assert [len(tree.leaves) for tree in trees] == [4] * 12
    assert engine._rows == []
    assert engine._blocks.num_tokens <= 150
    # Old trees first: what a tree needs is still there when its children ask for it, far less is computed than asked.
    assert engine.num_cached_tokens > 0.5 * engine.num_prompt_tokens
