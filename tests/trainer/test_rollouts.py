"""`rollout_func`: rows as in TRL, or trees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.support.models import make_model
from tests.support.trainers import (
    NUM_GENERATIONS,
    SETTINGS,
    SpyTrainer,
    assert_same_run,
    build,
    change,
    expected_advantages,
    logs_of,
    make_config,
    parity_reward,
    plain_prompts,
    trained,
)
from treepo_trl import SegmentTree, TreePOTrainer


def rows_rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on the row alone; each has tokens of an environment."""
    ids = trainer.processing_class(prompts)["input_ids"]
    completions = [[5 + (7 * i + j) % 50 for j in range(4 + i % 3)] for i in range(len(prompts))]
    return {
        "prompt_ids": ids,
        "completion_ids": completions,
        "logprobs": [[-1.0] * len(each) for each in completions],
        "env_mask": [[1, 0, 0] + [1] * (len(each) - 3) for each in completions],
        "row": list(range(len(prompts))),
    }


def row_reward(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
    return [value + 0.1 * each for value, each in zip(parity_reward(completion_ids), row, strict=True)]


@pytest.mark.parametrize("estimator", ["grpo", "treepo", "value_difference"])
def test_rows_train_as_with_trl(tmp_path: Path, estimator: str) -> None:
    settings = {"rollout_func": rows_rollout, "reward_funcs": row_reward}
    config = make_config(tmp_path / "tree", advantage_estimator=estimator, tree_packing="off")
    ours = trained(SeededTrainer, make_model(), config, **settings)
    stock_config = GRPOConfig(output_dir=str(tmp_path / "stock"), **SETTINGS)
    stock = trained(SeededStock, make_model(), stock_config, **settings)
    keys = ("grad_norm", "reward", "reward_std", "entropy")
    # A row has two sampled runs; with advantages per segment their tokens have the same sum in a chain.
    if estimator != "value_difference":
        assert_same_run(ours, stock, ("loss", *keys))
    assert change(ours) > 1e-3
    assert logs_of(ours, "tree/unique_tokens")[0] == sum(2 + i % 3 for i in range(8))


class SeededTrainer(TreePOTrainer):
    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        torch.manual_seed(self.state.global_step)  # the shuffle that follows
        return super()._calculate_rewards(*args, **kwargs)


class SeededStock(GRPOTrainer):
    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        torch.manual_seed(self.state.global_step)
        return super()._calculate_rewards(*args, **kwargs)


def test_trees_give_advantages_per_segment(tmp_path: Path) -> None:
    sampled: list[list[SegmentTree]] = []

    def rollout(prompts: list[str], trainer: TreePOTrainer) -> dict[str, Any]:
        ids = trainer.processing_class(prompts[::NUM_GENERATIONS])["input_ids"]
        sampled.append(trainer.sample_trees(ids))
        rows = [leaf for tree in sampled[-1] for leaf in tree.leaves]
        return {"trees": sampled[-1], "node": rows}

    nodes: list[list[int]] = []

    def reward(completion_ids: list[list[int]], node: list[int], **_: Any) -> list[float]:
        nodes.append(node)
        return parity_reward(completion_ids)

    config = make_config(tmp_path, advantage_estimator="value_difference", leaf_weighting="uniform")
    trainer = trained(SpyTrainer, make_model(), config, rollout_func=rollout, reward_funcs=reward)
    assert change(trainer) > 1e-3
    assert nodes == [[leaf for tree in trees for leaf in tree.leaves] for trees in sampled]
    for generation, trees in zip(trainer.generations, sampled, strict=True):
        generation["trees"] = trees
        expected = expected_advantages(generation, "group", "value_difference", weighting="uniform")
        torch.testing.assert_close(generation["output"]["advantages"], expected, atol=1e-5, rtol=1e-4)
    seeds = [told["seed"] for told in trainer.told]
    assert len(set(seeds)) == len(seeds)
    assert min(logs_of(trainer, "tree/leaf_unique_ratio")) > 1


def test_evaluation_takes_rows_and_trees(tmp_path: Path) -> None:
    def rollout(prompts: list[str], trainer: TreePOTrainer) -> dict[str, Any]:
        ids = trainer.processing_class(prompts)["input_ids"]
        if trainer.model.training:
            return rows_rollout(prompts, trainer)
        assert len(prompts) % 2 == 0
        trees = [SegmentTree.from_rows(each, [[10, 11], [10, 12]]) for each in ids[::2]]
        return {"trees": trees, "row": [0.0] * len(prompts)}

    config = make_config(tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    trainer = build(
        TreePOTrainer, make_model(), config, rollout_func=rollout, reward_funcs=row_reward, eval_dataset=None
    )
    metrics = trainer.evaluate(plain_prompts(4))
    assert metrics["eval_completions/mean_length"] == 2
    assert trainer._batch.trees == []
    assert trainer.model.training is False
    trainer.train()
    assert len(trainer._batch.trees) == 2


def _drop(rows: int) -> Callable[..., dict[str, Any]]:
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        columns = rows_rollout(prompts, trainer)
        return {name: values[:rows] for name, values in columns.items()}

    return rollout


def _change(**changes: Any) -> Callable[..., dict[str, Any]]:
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        columns = rows_rollout(prompts, trainer)
        return columns | {name: value(columns) for name, value in changes.items()}

    return rollout


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (_drop(4), "has returned 4 rows for 8 prompts. It is given each prompt 4 times"),
        (_change(env_mask=lambda columns: columns["env_mask"][:3]), "has returned 8 `prompt_ids` and 3 `env_mask`"),
        (
            _change(prompt_ids=lambda columns: [*columns["prompt_ids"][:0:-1], [5]]),
            "has returned different `prompt_ids` for rows 4 to 7",
        ),
        (_change(completion_ids=lambda columns: [[], *columns["completion_ids"][1:]]), "4 values for 0 tokens"),
        (lambda prompts, trainer: {"prompt_ids": [], "logprobs": []}, "must return keys"),  # TRL's error
        (
            lambda prompts, trainer: {"trees": [SegmentTree.from_rows([5], [[6], [7]])]},
            "has returned trees of 2 leaves. Return 2 trees, one per different prompt, with 1 to 4 leaves each",
        ),
    ],
)
def test_what_a_rollout_must_return(tmp_path: Path, rollout: Any, message: str) -> None:
    trainer = build(TreePOTrainer, make_model(), make_config(tmp_path), rollout_func=rollout)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_only_batches_of_a_training_are_sampled_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all processes do together in a batch, one process that samples for a user must not wait for."""
    trainer = build(TreePOTrainer, make_model(), make_config(tmp_path, max_steps=1))
    seen: list[object] = []
    engine = trainer.policy_engine
    original = engine.ready

    def ready(seed: str, prompts: list[list[int]], in_batch: bool = False) -> Any:
        seen.append(in_batch)
        return original(seed, prompts, in_batch)

    monkeypatch.setattr(engine, "ready", ready)
    monkeypatch.setattr(engine, "training_starts", lambda: seen.append("start"))
    trainer.sample_trees([[5, 6]])
    trainer.train()
    assert seen == [False, "start", True]
