"""Evaluation samples independent completions and leaves the training alone."""

from pathlib import Path

import pytest

from tests.support.trainers import (
    ReplayTrainer,
    SpyTrainer,
    assert_same_parameters,
    build,
    logs_of,
    make_config,
    parameters_of,
    plain_prompts,
    trained,
)


@pytest.mark.parametrize("packing", ["auto", "sdpa"])
def test_evaluation_samples_independently(tmp_path: Path, tiny_model_dir: str, packing: str) -> None:
    config = make_config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        tree_packing=packing,
        max_steps=3,
        beta=0.1,
    )
    trainer = trained(SpyTrainer, tiny_model_dir, config, eval_dataset=plain_prompts(4))
    assert len(trainer.all_trees) == len(trainer.generations) == 3  # trees for training alone
    assert len(trainer.evaluations) == 3 * 2  # 4 prompts x 2 completions in batches of 4
    for evaluation in trainer.evaluations:
        assert evaluation["output"]["advantages"].shape == (4,)
    for key in ("eval_reward", "eval_loss", "eval_rewards/parity_reward/mean", "eval_completions/mean_length"):
        values = logs_of(trainer, key)
        assert len(values) == 3
        assert all(value == value for value in values)
    evaluated = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert not [key for log in evaluated for key in log if "tree/" in key and "packing" not in key]
    rewards = [e["rewards"].mean().item() for e in trainer.evaluations]
    assert logs_of(trainer, "eval_reward")[0] == pytest.approx((rewards[0] + rewards[1]) / 2, abs=1e-5)
    assert all(len(tree.leaves) == 4 for trees in trainer.all_trees for tree in trees)


def test_evaluation_does_not_disturb_training(tmp_path: Path, tiny_model_dir: str) -> None:
    """With two steps per generation an evaluation falls between the sampling and the use of a batch."""
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 4, "loss_type": "grpo"}
    alone = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path / "a", **changes))
    config = make_config(tmp_path / "b", eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, **changes)
    evaluated = build(ReplayTrainer, tiny_model_dir, config, eval_dataset=plain_prompts(2))
    evaluated.recorded = alone.all_trees
    evaluated.train()
    assert_same_parameters(parameters_of(alone), parameters_of(evaluated))
    assert len(logs_of(evaluated, "eval_reward")) == 4
