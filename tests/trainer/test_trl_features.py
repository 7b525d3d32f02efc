"""GRPOTrainer's features: iterations, KL, LoRA, truncated completions, callbacks, precision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support.models import make_model
from tests.support.trainers import (
    SpyTrainer,
    build,
    expected_advantages,
    logs_of,
    make_config,
    parameters_of,
    parity_reward,
    plain_prompts,
    tables_of,
    trained,
)
from treepo_trl import TreePOConfig, TreePOTrainer


def changed_parameters(trainer: Any) -> list[str]:
    after = parameters_of(trainer)
    return [name for name, value in trainer.initial_parameters.items() if not torch.equal(value, after[name])]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kl_to_the_reference_model(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if kind == "lora" else None
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, beta=0.1, max_steps=3), peft_config=peft)
    assert (trainer.ref_model is None) == (kind == "lora")
    trainer.train()
    kl = logs_of(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-6
    reference = make_model().eval()
    generation = trainer.generations[-1]
    tree = generation["trees"][0]
    completion = tree.completion_ids(tree.leaves[0])
    with torch.no_grad():
        logits = reference(torch.tensor([tree.prompt_ids + completion])).logits[0, len(tree.prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    got = generation["output"]["ref_per_token_logps"][0, : len(completion)]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_lora_trains_the_adapter_alone(tmp_path: Path, is_wrapped: bool) -> None:
    """With the adapter as `peft_config`, and with a model that has one."""
    lora = LoraConfig(r=4, target_modules="all-linear")
    config = make_config(tmp_path, gradient_checkpointing=True)
    model = get_peft_model(make_model(), lora) if is_wrapped else make_model()
    trainer = trained(TreePOTrainer, model, config, peft_config=None if is_wrapped else lora)
    changed = changed_parameters(trainer)
    assert any("lora_B" in name for name in changed)
    assert all("lora_" in name for name in changed)
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("estimator", ["grpo", "treepo"])
def test_truncated_completions_are_masked_and_logged(tmp_path: Path, tiny_model_dir: str, estimator: str) -> None:
    """As GRPOTrainer does: the table and the tree log show what a completion was worth, masked or not."""
    changes = {"log_trees": True, "log_completions": True, "advantage_estimator": estimator}
    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, mask_truncated_completions=True, **changes))
    num_masked = num_kept = 0
    for step, (generation, table) in enumerate(zip(trainer.generations, tables_of(tmp_path), strict=True)):
        mask = generation["output"]["completion_mask"]
        leaves = [(tree, leaf) for tree in generation["trees"] for leaf in tree.leaves]
        for i, (tree, leaf) in enumerate(leaves):
            ids = tree.completion_ids(leaf)
            ended = ids[-1] in (0, 1)  # TRL counts EOS and padding as ended
            assert mask[i].sum() == (len(ids) if ended else 0)
            num_kept, num_masked = num_kept + ended, num_masked + (not ended)
        expected = expected_advantages(generation, "group", estimator, weighting="uniform")[:, 0].tolist()
        assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-4)
        lines = (tmp_path / f"trees/trees_{step:06d}.jsonl").read_text().splitlines()
        assert [a for line in lines for a in json.loads(line)["advantages"]] == pytest.approx(expected, abs=1e-4)
    assert num_masked
    assert num_kept


@pytest.mark.parametrize("args", ["default", "bf16"])
def test_default_precision(tmp_path: Path, tiny_model_dir: str, args: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's defaults (bfloat16 autocast, gradient checkpointing, packing by rule) run."""
    monkeypatch.chdir(tmp_path)
    changes = {"bf16": True, "gradient_checkpointing": True}
    if args == "bf16":
        changes["model_init_kwargs"] = {"dtype": "bfloat16"}
    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, **changes))
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(torch.tensor(logs_of(trainer, "loss"))))
    assert len(logs_of(trainer, "tree/packing_ratio")) == 2


def test_args_may_be_left_out(tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = TreePOTrainer(model=tiny_model_dir, reward_funcs=parity_reward, train_dataset=plain_prompts())
    assert isinstance(trainer.args, TreePOConfig)
    assert trainer.args.output_dir.endswith("-TreePO")
    assert trainer.args.num_generations == 8
