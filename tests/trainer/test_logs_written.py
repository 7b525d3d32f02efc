"""Metrics and tree logs of a training against its trees."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainers import (
    SpyTrainer,
    build,
    expected_advantages,
    logs_of,
    make_config,
    parity_reward,
)
from treepo_trl import SegmentTree, TreePOTrainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"branch_schedule": "spread"},
        {"branching_policy": "low_prob", "fallback_policy": "low_prob"},
        {"initial_branching_factor": [1, 3], "branching_factor": 4},
        {"branching_factor": 1},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_tree_metrics_are_those_of_the_trees(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, stop_repetition=False, **changes))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(trainer.all_trees) == 2
    for log, trees in zip(logs, trainer.all_trees, strict=True):
        unique = sum(len(node.token_ids) for tree in trees for node in tree.nodes)
        lengths = [len(tree.completion_ids(leaf)) for tree in trees for leaf in tree.leaves]
        paths = [tree.path(leaf) for tree in trees for leaf in tree.leaves]
        assert len(lengths) == 8
        assert log["tree/unique_tokens"] == unique
        assert log["tree/leaf_tokens"] == sum(lengths)
        assert log["tree/decoded_tokens"] == unique  # nothing is thrown away without a stop pattern
        assert log["tree/leaf_unique_ratio"] == pytest.approx(sum(lengths) / unique)
        assert log["tree/depth_mean"] == pytest.approx(sum(map(len, paths)) / 8)
        reasons = ("stop", "pattern", "repetition", "length")
        assert sum(log[f"tree/finish_{reason}_frac"] for reason in reasons) == pytest.approx(1)
        num_stopped = sum(tree.completion_ids(leaf)[-1] == 0 for tree in trees for leaf in tree.leaves)
        assert log["tree/finish_stop_frac"] == pytest.approx(num_stopped / 8)
        assert 0 <= log["tree/fallback_frac"] <= 1
        assert log["tree/engine_seconds"] > 0
        assert log["tree/sampler_seconds"] >= 0
        assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 8)


def test_tree_metrics_sum_over_generations(tmp_path: Path, tiny_model_dir: str) -> None:
    """One optimizer step over two generations logs the mean of both, as GRPOTrainer's metrics do."""
    config = make_config(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=1)
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    totals = [sum(tree.num_leaf_tokens for tree in trees) for trees in trainer.all_trees]
    assert len(totals) == 2
    assert logs_of(trainer, "tree/leaf_tokens") == [pytest.approx(sum(totals) / 2)]


@pytest.mark.parametrize("estimator", ["treepo", "grpo"])
def test_tree_log_reads_back(tmp_path: Path, tiny_model_dir: str, estimator: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_trees=True, advantage_estimator=estimator))
    trainer.train()
    files = sorted((tmp_path / "trees").iterdir())
    assert [file.name for file in files] == ["trees_000000.jsonl", "trees_000001.jsonl"]
    for step, (file, generation) in enumerate(zip(files, trainer.generations, strict=True)):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(records) == 2
        for i, (record, tree) in enumerate(zip(records, generation["trees"], strict=True)):
            assert record["step"] == step
            read = SegmentTree.from_dict(record["tree"])
            assert read.to_dict() == tree.to_dict()
            assert record["prompt"] == generation["inputs"][4 * i]["prompt"]
            assert record["rows"] == tree.depth_first_leaves()
            assert record["rewards"] == pytest.approx(generation["rewards"][4 * i : 4 * i + 4, 0].tolist())
            expected = expected_advantages(generation, "group", estimator=estimator)[4 * i : 4 * i + 4, 0]
            assert record["advantages"] == pytest.approx(expected.tolist(), abs=1e-4)
            for leaf, reward in zip(record["rows"], record["rewards"], strict=True):
                assert parity_reward([read.completion_ids(leaf)])[0] == pytest.approx(reward, abs=1e-5)


def test_tree_log_holds_every_generation_of_a_step(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, log_trees=True, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=1)
    for _ in range(2):  # a second run into the same folder writes its steps anew
        build(SpyTrainer, tiny_model_dir, config).train()
        lines = (tmp_path / "trees/trees_000000.jsonl").read_text().splitlines()
        assert len(lines) == 4


def test_no_tree_log_by_default(tmp_path: Path, tiny_model_dir: str) -> None:
    build(TreePOTrainer, tiny_model_dir, make_config(tmp_path, max_steps=1)).train()
    assert not (tmp_path / "trees").exists()
