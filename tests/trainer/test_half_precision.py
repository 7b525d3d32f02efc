"""Trainings in float16: scaled gradients of packed rows, an adapter in float32, and cards without bfloat16."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model

from tests.support.half_precision import float16_on_cpu
from tests.support.models import make_model
from tests.support.rows import ready_model, trees
from tests.support.trainers import build, make_config
from treepo_trl import TreePOTrainer
from treepo_trl.policy.starting_adapter import keep_master_weights
from treepo_trl.settings.arguments import check_number_type
from treepo_trl.update.packed_forward import PackedForward


def test_a_card_without_bfloat16_is_told_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch calls an emulated bfloat16 supported unless it is asked not to."""
    args: Any = SimpleNamespace(bf16=True, fp16=False, use_cpu=False, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(
        ValueError, match=r"Tesla T4.*has no bfloat16.*`fp16=True`, `bf16=False` and `dtype='float16'`"
    ):
        check_number_type(args)
    args.bf16, args.fp16 = False, True
    check_number_type(args)


def test_float16_on_a_processor_would_be_float32(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`fp16=True` needs a GPU"):
        build(TreePOTrainer, make_model(), make_config(tmp_path, fp16=True))


def test_an_adapter_is_trained_in_float32_and_a_16_bit_model_is_not_trained() -> None:
    base = make_model().to(torch.float16)
    with pytest.raises(ValueError, match=r"weights of a model in torch\.float16.*`--dtype float32`"):
        keep_master_weights(base)
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:  # as TRL leaves that of a 4-bit model
            parameter.data = parameter.data.to(torch.bfloat16)
    keep_master_weights(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}


def gradients(packing: Any, mixed_precision: str) -> torch.Tensor:
    """All gradients of a loss over trees, scaled and unscaled again where the forward is in float16."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model, (ids, mask, num_scored) = ready_model(), trees()
    forward = PackedForward(packing, accelerator)
    forward.checked = {(id(model), "sdpa")}
    logps, _, _, _ = forward(model, ids, mask, num_scored, len(ids), False, False, lambda *_: None)  # pyright: ignore
    scaler: Any = accelerator.scaler or torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.scale((logps * mask[:, -num_scored:]).sum() / mask.sum()).backward()
    scaler.unscale_(optimizer)
    AcceleratorState._reset_state()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_scaled_gradients_of_the_packed_update_are_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    float16_on_cpu(monkeypatch)
    expected = gradients("sdpa", "no")
    half = gradients("sdpa", "fp16")
    assert 0 < (half - expected).norm() < 0.02 * expected.norm()


def few(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Tokens below 30 are right."""
    return [sum(token < 30 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_tiny_model_learns_in_every_number_type(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float16_on_cpu(monkeypatch)
    mixed = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    settings = {"max_steps": 12, "learning_rate": 0.03, "optim": "adamw_torch", "per_device_train_batch_size": 32}
    trainer = build(
        TreePOTrainer,
        make_model(initializer_range=0.2),
        make_config(tmp_path, **settings, **mixed),
        reward_funcs=few,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    )
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
