"""Advantages of a training's batches against loops over their trees."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.trainers import SpyTrainer, expected_advantages, make_config, parity_reward, trained
from treepo_trl import SegmentTree
from treepo_trl.update.row_advantages import row_advantages


def coarse_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Often equal in a subgroup."""
    return [float(ids[0] % 2) if len(ids) % 3 else 0.5 for ids in completion_ids]


@pytest.mark.parametrize(
    ("estimator", "scale", "options"),
    [
        ("treepo", "group", {}),
        ("treepo_size_weighted", "batch", {}),
        ("treepo", "none", {"rejection": True}),
        ("grpo", "none", {"weighting": "inverse_branching"}),
        ("value_difference", "none", {"weighting": "inverse_branching"}),
        ("leave_one_out", "none", {}),
        ("optimal_baseline", "batch", {"weighting": "inverse_branching"}),
    ],
)
def test_advantages_are_those_of_the_trees(
    tmp_path: Path, tiny_model_dir: str, estimator: str, scale: str, options: dict[str, Any]
) -> None:
    rejection, weighting = options.get("rejection", False), options.get("weighting", "uniform")
    config = make_config(
        tmp_path,
        scale_rewards=scale,
        advantage_estimator=estimator,
        subgroup_rejection=rejection,
        leaf_weighting=weighting,
        max_steps=3,
    )
    rewards = coarse_reward if rejection else parity_reward
    trainer = trained(SpyTrainer, tiny_model_dir, config, reward_funcs=rewards)
    assert len(trainer.generations) == 3
    differences = []
    for generation in trainer.generations:
        output, trees = generation["output"], generation["trees"]
        assert output["advantages"].shape == output["completion_ids"].shape
        expected = expected_advantages(generation, scale, estimator, rejection, weighting)
        torch.testing.assert_close(output["advantages"], expected, atol=1e-5, rtol=1e-4)
        assert (output["advantages"] * (1 - output["completion_mask"])).abs().max() == 0
        # The rows are the leaves of the trees, and the trees branch below the root.
        rows = [tree.completion_ids(leaf) for tree in trees for leaf in tree.leaves]
        lengths = output["completion_mask"].sum(1).tolist()
        assert [ids[:n] for ids, n in zip(output["completion_ids"].tolist(), lengths, strict=True)] == rows
        simpler = expected_advantages(generation, scale, estimator if options else "grpo", weighting="uniform")
        differences.append((expected - simpler).abs().max())
    assert max(differences) > 0.01, "the option must make a difference for this test to see it"


@pytest.mark.parametrize("estimator", ["leave_one_out", "optimal_baseline"])
def test_rewards_in_single_precision_are_compared_in_double(estimator: str) -> None:
    """One unsure completion among sure ones has nearly all of the scores; what is left of a difference is noise."""
    tree = SegmentTree([9])
    tree.add(None, [1] * 900, [-0.36] * 900, "stop")
    for _ in range(7):
        tree.add(None, [1], [-1e-6], "stop")

    def advantages(rewards: list[float]) -> torch.Tensor:
        return row_advantages([tree], torch.tensor(rewards), torch.ones(8), 900, estimator, weights_leaves=True)

    assert advantages([12.3] * 8).abs().max() < 1e-6
    values = advantages([0.0, *[1.0] * 7])
    assert values.dtype == torch.float32
    assert values[0, 0].item() == pytest.approx(-1, abs=1e-5)
