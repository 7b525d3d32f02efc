"""Advantages of a training's batches against loops over their trees."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.trainers import (
    SpyTrainer,
    build,
    expected_advantages,
    make_config,
    parity_reward,
    tables_of,
)
from treepo_trl import SegmentTree


def coarse_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Often equal in a subgroup."""
    return [float(ids[0] % 2) if len(ids) % 3 else 0.5 for ids in completion_ids]


@pytest.mark.parametrize(
    ("estimator", "scale", "rejection"),
    [
        ("treepo", "group", False),
        ("treepo_size_weighted", "batch", False),
        ("treepo", "none", False),
        ("treepo", "none", True),
    ],
)
def test_advantages_are_those_of_the_trees(
    tmp_path: Path, tiny_model_dir: str, estimator: str, scale: str, rejection: bool
) -> None:
    config = make_config(
        tmp_path, scale_rewards=scale, advantage_estimator=estimator, subgroup_rejection=rejection, max_steps=4
    )
    trainer = build(SpyTrainer, tiny_model_dir, config, reward_funcs=coarse_reward if rejection else parity_reward)
    trainer.train()
    assert len(trainer.generations) == 4
    differences = []
    for generation in trainer.generations:
        output, trees = generation["output"], generation["trees"]
        assert output["advantages"].shape == output["completion_ids"].shape
        expected = expected_advantages(generation, scale, estimator=estimator, rejection=rejection)
        torch.testing.assert_close(output["advantages"], expected, atol=1e-5, rtol=1e-4)
        assert (output["advantages"] * (1 - output["completion_mask"])).abs().max() == 0
        # The rows are the leaves of the trees, and the trees branch below the root.
        rows = [tree.completion_ids(leaf) for tree in trees for leaf in tree.leaves]
        lengths = output["completion_mask"].sum(1).tolist()
        assert [ids[:n] for ids, n in zip(output["completion_ids"].tolist(), lengths, strict=True)] == rows
        simpler = expected_advantages(generation, scale, estimator=estimator if rejection else "grpo")
        differences.append((expected - simpler).abs().max())
    assert max(differences) > 0.01, "the option must make a difference for this test to see it"


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


@pytest.mark.parametrize(
    ("estimator", "weighting"), [("value_difference", "inverse_branching"), ("leave_one_out", "uniform")]
)
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
        leaves = tree.leaves
        values = {leaf: next(rewards) for leaf in leaves}
        shares = dict(zip(leaves, tree.leaf_weights(), strict=True))
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


def test_leaf_weighting_weights_the_loss(tmp_path: Path, tiny_model_dir: str) -> None:
    """`inverse_branching`: weighted group mean, and W times the weight on each leaf's advantage."""
    config = make_config(
        tmp_path, leaf_weighting="inverse_branching", advantage_estimator="grpo", scale_rewards="none"
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
            for leaf in tree.leaves:
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


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_logged_advantages_are_the_trees(tmp_path: Path, tiny_model_dir: str, steps_per_generation: int) -> None:
    """The table of each step shows the generation that is under way; entries are neither lost nor doubled."""
    config = make_config(
        tmp_path,
        log_completions=True,
        per_device_train_batch_size=8 // steps_per_generation,
        steps_per_generation=steps_per_generation,
        max_steps=2 * steps_per_generation,
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    assert len(trainer.generations) == 2
    tables = tables_of(tmp_path)
    assert len(tables) == 2 * steps_per_generation
    for step, table in enumerate(tables):
        generation = trainer.generations[step // steps_per_generation]
        assert len(table) == 8
        expected = expected_advantages(generation, "group")[:, 0].tolist()
        assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-4)
        assert table["parity_reward"].tolist() == pytest.approx(generation["rewards"][:, 0].tolist(), abs=1e-6)
