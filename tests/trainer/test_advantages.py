"""Advantages of a training's batches against loops over their trees."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.support.trainers import (
    NUM_GENERATIONS,
    SpyTrainer,
    build,
    expected_advantages,
    make_config,
)
from treepo_trl import SegmentTree


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("estimator", ["treepo", "treepo_size_weighted"])
def test_advantages_are_those_of_the_trees(tmp_path: Path, tiny_model_dir: str, scale: str, estimator: str) -> None:
    config = make_config(
        tmp_path, scale_rewards=scale, advantage_estimator=estimator, num_generations=4, log_completions=True
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    assert len(trainer.generations) == 2
    for generation in trainer.generations:
        output, trees = generation["output"], generation["trees"]
        assert output["advantages"].shape == output["completion_ids"].shape
        expected = expected_advantages(generation, scale, estimator=estimator)
        torch.testing.assert_close(output["advantages"], expected, atol=1e-5, rtol=1e-4)
        assert (output["advantages"] * (1 - output["completion_mask"])).abs().max() == 0
        # The rows are the leaves of the trees, and the trees branch below the root.
        rows = [tree.completion_ids(leaf) for tree in trees for leaf in tree.depth_first_leaves()]
        lengths = output["completion_mask"].sum(1).tolist()
        assert [ids[:n] for ids, n in zip(output["completion_ids"].tolist(), lengths, strict=True)] == rows
        plain = expected_advantages(generation, scale, estimator="grpo")
        assert (expected - plain).abs().max() > 0.01, "the trees must make a difference for this test to see it"


def slow_segment_value(
    tree: SegmentTree, values: dict[int, float], weights: dict[int, float], node: int, estimator: str
) -> float:
    """`value_difference` or `leave_one_out` of a node from the rewards and weights of the leaves, in loops."""

    def mean(leaves: list[int]) -> float:
        return sum(weights[leaf] * values[leaf] for leaf in leaves) / sum(weights[leaf] for leaf in leaves)

    def below(ancestor: int | None) -> list[int]:
        return [leaf for leaf in tree.leaves if ancestor is None or ancestor in tree.path(leaf)]

    above = [None, *tree.path(tree.nodes[node].parent)]
    if estimator == "value_difference":
        return mean(below(node)) - mean(below(above[-1]))
    others = [leaf for ancestor in above for leaf in below(ancestor) if leaf not in below(node)]
    return mean(below(node)) - mean(others) if others else 0.0


@pytest.mark.parametrize("weighting", ["uniform", "inverse_branching"])
@pytest.mark.parametrize("estimator", ["value_difference", "leave_one_out"])
def test_each_segment_has_its_own_advantage(
    tmp_path: Path, tiny_model_dir: str, estimator: str, weighting: str
) -> None:
    config = make_config(
        tmp_path, scale_rewards="none", advantage_estimator=estimator, leaf_weighting=weighting, max_steps=1
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    (generation,) = trainer.generations
    rewards = iter(generation["rewards"].nansum(1).tolist())
    advantages = iter(generation["output"]["advantages"])
    num_values = set()
    for tree in generation["trees"]:
        leaves = tree.depth_first_leaves()
        values = {leaf: next(rewards) for leaf in leaves}
        shares = dict(zip(tree.leaves, tree.leaf_weights(), strict=True))
        weights = shares if weighting == "inverse_branching" else dict.fromkeys(leaves, 1 / len(leaves))
        for leaf in leaves:
            expected = [
                slow_segment_value(tree, values, weights, node, estimator) * weights[leaf] * len(leaves)
                for node in tree.path(leaf)
                for _ in tree.nodes[node].token_ids
            ]
            row = next(advantages).tolist()
            assert row[: len(expected)] == pytest.approx(expected, abs=1e-5)
            assert not any(row[len(expected) :])
            num_values.add(len({round(value, 6) for value in expected}))
    assert max(num_values) > 1


def test_subgroup_rejection_leaves_out_equal_subgroups(tmp_path: Path, tiny_model_dir: str) -> None:
    def coarse(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(ids[0] % 2) if len(ids) % 3 else 0.5 for ids in completion_ids]  # often equal in a subgroup

    config = make_config(tmp_path, subgroup_rejection=True, scale_rewards="none", max_steps=4)
    trainer = build(SpyTrainer, tiny_model_dir, config, reward_funcs=coarse)
    trainer.train()
    differs = False
    for generation in trainer.generations:
        expected = expected_advantages(generation, "none", rejection=True)
        torch.testing.assert_close(generation["output"]["advantages"], expected, atol=1e-5, rtol=1e-4)
        differs |= not torch.allclose(expected, expected_advantages(generation, "none"))
    assert differs


def test_leaf_weighting_weights_the_loss(tmp_path: Path, tiny_model_dir: str) -> None:
    """`inverse_branching`: weighted group mean, and W times the weight on each leaf's advantage."""
    config = make_config(
        tmp_path, leaf_weighting="inverse_branching", advantage_estimator="grpo", scale_rewards="none", max_steps=4
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    uneven = False
    for generation in trainer.generations:
        advantages = generation["output"]["advantages"]
        assert advantages.dim() == 2
        for i, tree in enumerate(generation["trees"]):
            rewards = generation["rewards"][i * 4 : i * 4 + 4, 0].tolist()
            weights = []
            for leaf in tree.depth_first_leaves():
                weight = 1.0
                for node in tree.path(leaf):
                    parent = tree.nodes[node].parent
                    weight /= len(tree.root_children if parent is None else tree.nodes[parent].children)
                weights.append(weight)
            assert sum(weights) == pytest.approx(1)
            uneven |= len(set(weights)) > 1
            mean = sum(w * r for w, r in zip(weights, rewards, strict=True))
            expected = [4 * w * (r - mean) for w, r in zip(weights, rewards, strict=True)]
            assert advantages[i * 4 : i * 4 + 4, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert uneven


def test_logged_advantages_are_the_trees(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_completions=True, scale_rewards="group"))
    trainer.train()
    for step, generation in enumerate(trainer.generations, start=1):
        expected = expected_advantages(generation, "group")[:, 0].tolist()
        assert generation["logged"] == pytest.approx(expected, abs=1e-4)
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert len(table) == 2 * NUM_GENERATIONS
        assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-4)
        assert table["parity_reward"].tolist() == pytest.approx(generation["rewards"][:, 0].tolist(), abs=1e-6)
    assert list(trainer._logs["advantages"]) == pytest.approx(trainer.generations[-1]["logged"])


def test_logged_advantages_keep_their_place_over_generations(tmp_path: Path, tiny_model_dir: str) -> None:
    """One generation for two logged steps, then the next: old entries are neither lost nor doubled."""
    config = make_config(
        tmp_path, log_completions=True, per_device_train_batch_size=4, steps_per_generation=2, max_steps=4
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    assert len(trainer.generations) == 2
    for log in ("prompt", "completion", "advantages"):
        assert len(trainer._logs[log]) == 8
    expected = expected_advantages(trainer.generations[-1], "group")[:, 0].tolist()
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-4)
