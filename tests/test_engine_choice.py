"""Which adapters a training may have, by the engine that samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from tests.support.models import make_model
from tests.support.trainers import build, change, make_config
from treepo_trl import TreePOTrainer


VIRTUAL_TOKENS = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)


@pytest.mark.parametrize("use_vllm", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", VIRTUAL_TOKENS)
def test_virtual_tokens_are_refused_by_both_engines(
    tmp_path: Path, kind: Any, wrapped: bool, use_vllm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: True)
    adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model, given = (get_peft_model(make_model(), adapter), None) if wrapped else (make_model(), adapter)
    with pytest.raises(ValueError, match=r"_TUNING, which puts virtual tokens .* LoRA .* or use `GRPOTrainer`"):
        build(TreePOTrainer, model, make_config(tmp_path, use_vllm=use_vllm), peft_config=given)


@pytest.mark.parametrize("kind", VIRTUAL_TOKENS)
def test_with_virtual_tokens_a_row_depends_on_its_padding(kind: Any) -> None:
    """The reason: on the base it does not."""

    def logprobs(model: Any, padding: int) -> torch.Tensor:
        rows = torch.tensor([[1] * padding + [10, 11, 12]])
        mask = (torch.arange(rows.size(1)) >= padding).long()[None]
        with torch.no_grad():
            return model(input_ids=rows, attention_mask=mask).logits[:, -1].log_softmax(-1)  # as TRL forwards rows

    base = make_model().eval()
    torch.testing.assert_close(logprobs(base, 4), logprobs(base, 0))
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    assert (logprobs(model, 4) - logprobs(model, 0)).abs().max() > 0.5


@pytest.mark.parametrize(
    "adapter",
    [
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
    ],
    ids=["IA3", "LoHa"],
)
def test_other_adapters_are_trained_with_transformers(tmp_path: Path, adapter: Any) -> None:
    trainer = build(TreePOTrainer, make_model(), make_config(tmp_path, max_steps=1), peft_config=adapter)
    trainer.train()
    assert change(trainer) > 0


def test_an_adapter_that_cannot_be_merged_does_not_reach_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: True)
    adapter = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    with pytest.raises(ValueError, match=r"ADAPTION_PROMPT: vLLM serves LoRA .*Leave `use_vllm` out, or change the"):
        build(
            TreePOTrainer,
            make_model(),
            make_config(tmp_path, use_vllm=True, vllm_lora_sync="merge"),
            peft_config=adapter,
        )


def test_adapter_is_checked_by_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: True)
    config = make_config(tmp_path, use_vllm=True)
    with pytest.raises(ValueError, match=r"`use_dora=True`.*vllm_lora_sync='merge'"):
        build(TreePOTrainer, make_model(), config, peft_config=LoraConfig(use_dora=True, target_modules=["q_proj"]))


def test_adapter_is_not_checked_without_vllm(tmp_path: Path) -> None:
    build(
        TreePOTrainer,
        make_model(),
        make_config(tmp_path),
        peft_config=LoraConfig(use_dora=True, target_modules=["q_proj"]),
    )
