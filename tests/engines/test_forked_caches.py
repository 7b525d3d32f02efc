"""Copies of a model's own cache: what is shared, what is dropped, and that no copy touches another."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.families import FAMILY
from tests.support.segments import EOS, GREEDY, PROMPTS, drain, full_logprobs, generated
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SegmentEngineError, SegmentRequest
from treepo_trl.engines.for_model import engine_for_model
from treepo_trl.engines.forked_caches import ForkedCacheEngine
from treepo_trl.engines.own_model import compare_with_plain_forward


pytestmark = pytest.mark.filterwarnings("ignore")


STATEFUL = ["Qwen3.5", "Falcon-H1", "LFM2", "Mamba-2", "DeepSeek-V3"]


@pytest.fixture(params=[*STATEFUL, "Llama"])  # the last one on the engine with slots
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILY[request.param].model()


def test_a_shared_prefix_is_computed_once(model: PreTrainedModel) -> None:
    engine = engine_for_model(model, [99])
    drain(engine, [SegmentRequest(i, PROMPTS[1], 2) for i in range(4)])
    assert (engine.num_prompt_tokens, engine.num_prefilled_tokens) == (24, 6)  # all but the last of 7 tokens
    drain(engine, [SegmentRequest(i, [*PROMPTS[1], 50], 2) for i in range(4)])
    assert engine.num_prefilled_tokens == 7  # behind the six that are kept


def test_a_path_ends_in_the_state_that_its_children_start_from(model: PreTrainedModel) -> None:
    engine = engine_for_model(model, [99])
    first = drain(engine, [SegmentRequest(i, PROMPTS[3], 5) for i in range(6)])
    assert len({tuple(result.token_ids) for result in first.values()}) > 1
    computed = engine.num_prefilled_tokens
    second = drain(engine, [SegmentRequest(i, PROMPTS[3] + first[i // 2].token_ids, 5) for i in range(12)])
    assert engine.num_prefilled_tokens == computed
    for i, result in second.items():  # siblings have gone on from copies of one state
        expected = full_logprobs(model, PROMPTS[3] + first[i // 2].token_ids, result.token_ids)
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_requests_of_all_lengths_are_those_of_generate(model: PreTrainedModel) -> None:
    """They end at different times and at an EOS token; other rows make no difference."""
    engine = engine_for_model(model, [EOS], GREEDY)
    results = drain(engine, [SegmentRequest(i, prompt, 3 + 2 * i) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        assert results[i].token_ids == generated(model, [prompt], 3 + 2 * i)[0]


def test_new_weights_drop_old_states(model: PreTrainedModel) -> None:
    engine = engine_for_model(model, [99], GREEDY)
    drain(engine, [SegmentRequest(0, PROMPTS[1], 3)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    result = drain(engine, [SegmentRequest(0, [*PROMPTS[1], 3], 6)])[0]
    expected = full_logprobs(model, [*PROMPTS[1], 3], result.token_ids)
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_little_memory_costs_time_and_changes_nothing() -> None:
    model = FAMILY["Qwen3.5"].model()
    requests = [SegmentRequest(i, PROMPTS[i % 6] + [i], 4) for i in range(12)]
    expected = drain(ForkedCacheEngine(model, [99], GREEDY), requests)
    small = ForkedCacheEngine(model, [99], GREEDY, max_batch_bytes=1, max_cached_bytes=1)
    batches = []
    forward = small._forward

    def recorded(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append(len(input_ids))
        return forward(input_ids, *args, **kwargs)

    small._forward = recorded  # pyright: ignore[reportAttributeAccessIssue]
    results = drain(small, requests)
    assert {i: r.token_ids for i, r in results.items()} == {i: r.token_ids for i, r in expected.items()}
    assert max(batches) == 1
    assert len(small._states._kept) == 1


def test_trees_grow_and_aborting_drops_everything() -> None:
    model = FAMILY["Falcon-H1"].model()
    engine = engine_for_model(model, [EOS], with_entropies=True)
    assert isinstance(engine, ForkedCacheEngine)
    config = TreeSamplingConfig(
        num_generations=8,
        max_completion_length=12,
        segment_length=4,
        branching_policy="entropy",
        stop_repetition=False,
    )
    (tree,) = TreeSampler(engine, config, [EOS]).sample([PROMPTS[1]], seed=0)
    assert len(tree.leaves) == 8
    assert engine.num_cached_tokens > 0.5 * engine.num_prompt_tokens
    engine.submit([SegmentRequest(0, [5, 6], 3)])
    engine.abort()
    assert engine.collect() == []
    assert not engine._states._kept
    with pytest.raises(SegmentEngineError, match="vocabulary of 65"):
        engine.submit([SegmentRequest(0, [65], 3)])


def test_a_model_that_is_computed_wrongly_stops_the_run() -> None:
    """Bamba counts positions from 0 again where it is not told them."""
    model = FAMILY["Bamba"].model()
    assert drain(ForkedCacheEngine(model, [99]), [SegmentRequest(0, PROMPTS[1], 4)])
    engine = ForkedCacheEngine(model, [99])
    engine._takes_positions = False
    with pytest.raises(RuntimeError, match=r"does not compute what BambaForCausalLM computes.*use_vllm=True"):
        drain(engine, [SegmentRequest(0, PROMPTS[1], 4)])


def test_the_comparison_sees_other_logits() -> None:
    model = FAMILY["Llama"].model()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]])).logits[0, -1]
    compare_with_plain_forward(model, PROMPTS[1], logits + 7)  # the same distribution
    for wrong in (logits.flip(0), logits * 1.01, logits * float("nan")):
        with pytest.raises(RuntimeError, match="after 7 tokens"):
            compare_with_plain_forward(model, PROMPTS[1], wrong)


def test_a_model_without_a_cache_of_this_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILY["Mamba-2"].model()
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids: None)
    with pytest.raises(ValueError, match=r"cannot sample from Mamba2ForCausalLM.*no cache.*use_vllm=True"):
        engine_for_model(model, [EOS])
