"""Trainings that go on from an adapter: the policy at the start is the reference, also after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support.segments import full_logprobs
from tests.support.trainers import (
    RecordingTrainer,
    assert_same_parameters,
    build,
    change,
    logs_of,
    make_config,
    parameters_of,
    plain_prompts,
)


BETA = 0.5
KL: dict[str, Any] = {"beta": BETA, "loss_type": "grpo"}
NO_REWARD: dict[str, Any] = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
STEPS: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 3}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str) -> str:
    """A random adapter, which changes what the model says by about a nat per token."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    folder = str(tmp_path_factory.mktemp("adapter"))
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained(folder)
    return folder


def policy(base: str, adapter: str, **changes: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter, **{"is_trainable": True, **changes})


def test_the_reference_is_the_policy_at_the_start(tmp_path: Path, tiny_model_dir: str, adapter: str) -> None:
    """Without rewards nothing but the KL term could move the policy, and at its smallest value it does not."""
    settings = {**KL, "max_steps": 2}
    trainer = build(RecordingTrainer, policy(tiny_model_dir, adapter), make_config(tmp_path, **settings), **NO_REWARD)
    trainer.train()
    assert logs_of(trainer, "kl") == pytest.approx([0, 0], abs=1e-6)
    assert change(trainer) < 1e-5
    assert len(trainer.all_trees) == 2
    # To the bare base the same rows are far away.
    with trainer.model.disable_adapter():
        base = full_logprobs(trainer.model, [10, 11], [12, 13, 14])
    assert (full_logprobs(trainer.model, [10, 11], [12, 13, 14]) - base).abs().max() > 0.1


def test_a_resumed_training_keeps_adapter_and_reference(tmp_path: Path, tiny_model_dir: str, adapter: str) -> None:
    """transformers alone would load the reference and leave the policy at the starting adapter."""

    def make(name: str, **changes: Any) -> Any:
        config = make_config(tmp_path / name, **KL, **STEPS, **changes)
        return build(RecordingTrainer, policy(tiny_model_dir, adapter), config)

    whole = make("whole", save_strategy="steps", save_steps=1)
    start = parameters_of(whole)
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert change(whole) > 1e-3
    assert_same_parameters(parameters_of(whole), parameters_of(resumed), 0.0)
    assert logs_of(whole, "kl") == logs_of(resumed, "kl")
    reference = {name: value for name, value in parameters_of(resumed).items() if ".ref." in name}
    assert reference
    for name, value in reference.items():
        assert torch.equal(value, start[name.replace(".ref.", ".default.")])


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path, tiny_model_dir: str, adapter: str) -> None:
    """With the reference beside it in the checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_best", "greater_is_better": True}
    config = make_config(tmp_path, **KL, **STEPS, **settings)
    trainer = build(RecordingTrainer, policy(tiny_model_dir, adapter), config, eval_dataset=plain_prompts(1))
    trainer._evaluate = lambda *_, **__: {"eval_best": [0.0, 1.0, 0.5][trainer.state.global_step - 1]}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = load_file(tmp_path / "checkpoint-2/adapter_model.safetensors")
    now = {name: p for name, p in trainer.model.named_parameters() if ".default." in name}
    for name, value in now.items():
        assert torch.equal(value, saved[name.replace(".default.", ".")])


def test_a_quantized_policy_starts_at_its_reference_and_resumes_in_its_precision(
    tmp_path: Path, tiny_model_dir: str, adapter: str
) -> None:
    """TRL rounds the adapter to bfloat16 after it has copied it."""
    pytest.importorskip("bitsandbytes")

    def make(name: str, **changes: Any) -> Any:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=settings, dtype="float32")
        config = make_config(tmp_path / name, **KL, tree_packing="off", **changes)
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        return build(RecordingTrainer, model, config)

    trainer = make("whole", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert logs_of(trainer, "kl")[0] == pytest.approx(0, abs=1e-7)
    resumed = make("resumed", max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    precisions = {p.dtype for name, p in resumed.model.named_parameters() if "lora_" in name}
    assert precisions == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "beta", "message"),
    [
        ({"is_trainable": False}, 0.0, "adapter is frozen.*is_trainable=True"),
        ({"adapter_name": "sft"}, BETA, "called 'sft'.*called 'default'"),
    ],
)
def test_what_would_not_be_trained_is_refused(
    tmp_path: Path, tiny_model_dir: str, adapter: str, changes: dict[str, Any], beta: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(RecordingTrainer, policy(tiny_model_dir, adapter, **changes), make_config(tmp_path, beta=beta))
