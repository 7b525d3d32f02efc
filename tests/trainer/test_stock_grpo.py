"""Without branching `TreePOTrainer` is TRL's `GRPOTrainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig

from tests.support.trainers import (
    SETTINGS,
    ReplayStockTrainer,
    SpyTrainer,
    assert_same_run,
    build,
    largest_change,
    make_config,
    parameters_of,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "loss_type": "grpo", "scale_rewards": "batch"},
        {"loss_type": "bnpo", "scale_rewards": "none", "beta": 0.1},
        {"mask_truncated_completions": True, "num_iterations": 2},
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
        {"pad_to_multiple_of": 8},
        {"off_policy_mask_threshold": 0.001, "num_iterations": 2},
        {"entropy_coef": 0.1},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_without_branching_equals_stock_grpo(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    config = make_config(
        tmp_path / "tree", branching_factor=1, advantage_estimator="grpo", tree_packing="off", **changes
    )
    ours = build(SpyTrainer, tiny_model_dir, config)
    before = parameters_of(ours)
    ours.train()
    stock = build(
        ReplayStockTrainer, tiny_model_dir, GRPOConfig(output_dir=str(tmp_path / "stock"), **{**SETTINGS, **changes})
    )
    stock.recorded = ours.completions
    stock.train()
    assert_same_run(ours, stock)
    assert largest_change(before, parameters_of(ours)) > 1e-2
    # Every metric of GRPOTrainer is logged, with the same value, and only `tree/` is new.
    for a, b in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert {k for k in set(a) ^ set(b) if not k.startswith(("tree/", "profiling/"))} == set()
        for key in set(a) & set(b):
            if "time" in key or "runtime" in key or "per_second" in key or key.startswith("profiling/"):
                continue
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4, nan_ok=True), key


def test_without_branching_every_estimator_is_grpo(tmp_path: Path, tiny_model_dir: str) -> None:
    """A tree whose leaves share nothing but the prompt has one group."""
    advantages = {}
    for estimator in ("grpo", "treepo", "treepo_size_weighted"):
        config = make_config(
            tmp_path, branching_factor=1, advantage_estimator=estimator, max_steps=1, learning_rate=0.0
        )
        trainer = build(SpyTrainer, tiny_model_dir, config)
        trainer.train()
        output = trainer.generations[0]["output"]
        a = output["advantages"]
        advantages[estimator] = a if a.dim() == 2 else a[:, None] * output["completion_mask"]
    assert advantages["grpo"].abs().max() > 0.1
    torch.testing.assert_close(advantages["treepo"], advantages["grpo"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(advantages["treepo_size_weighted"], advantages["grpo"], atol=1e-5, rtol=1e-5)
