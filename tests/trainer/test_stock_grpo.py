"""Without branching `TreePOTrainer` is TRL's `GRPOTrainer`."""

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from tests.support.trainers import (
    SETTINGS,
    ReplayStockTrainer,
    SpyTrainer,
    assert_same_logs,
    assert_same_run,
    build,
    change,
    length_reward,
    logs_of,
    make_config,
    parity_reward,
    trained,
)


@pytest.mark.parametrize(
    ("estimator", "changes"),
    [
        ("grpo", {}),
        ("treepo", {"num_iterations": 2, "loss_type": "grpo", "scale_rewards": "batch"}),
        ("treepo_size_weighted", {"loss_type": "bnpo", "scale_rewards": "none", "beta": 0.1}),
        ("grpo", {"mask_truncated_completions": True, "num_iterations": 2}),
        ("treepo", {"top_entropy_quantile": 0.5, "pad_to_multiple_of": 8}),
        ("grpo", {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2}),
        ("grpo", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("treepo", {"per_device_train_batch_size": 4, "steps_per_generation": 2, "entropy_coef": 0.1}),
        ("treepo_size_weighted", {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}),
        ("grpo", {"off_policy_mask_threshold": 0.001, "num_iterations": 2}),
        ("treepo", {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.3]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_without_branching_equals_stock_grpo(
    tmp_path: Path, tiny_model_dir: str, estimator: str, changes: dict[str, Any]
) -> None:
    """A tree whose leaves share nothing but the prompt has one group, so every estimator is GRPO's."""
    rewards = [parity_reward, length_reward][: len(changes.get("reward_weights", [1.0]))]
    config = make_config(
        tmp_path / "tree", branching_factor=1, advantage_estimator=estimator, tree_packing="off", **changes
    )
    ours = trained(SpyTrainer, tiny_model_dir, config, reward_funcs=rewards)
    stock_config = GRPOConfig(output_dir=str(tmp_path / "stock"), **{**SETTINGS, **changes})
    stock = build(ReplayStockTrainer, tiny_model_dir, stock_config, reward_funcs=rewards)
    stock.recorded = ours.completions
    stock.train()
    assert_same_run(ours, stock)
    assert change(ours) > 1e-2
    assert logs_of(ours, "tree/depth_mean")[0] > 1
    # Every metric of GRPOTrainer is logged, with the same value, and only `tree/` is new.
    assert_same_logs(ours, stock, "tree/")
