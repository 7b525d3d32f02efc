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
from treepo_trl import SegmentTree


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"initial_branching_factor": [1, 3], "branching_policy": "low_prob", "fallback_policy": "low_prob"},
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
    assert not (tmp_path / "trees").exists()  # unless it is asked for


def test_a_step_over_two_generations(tmp_path: Path, tiny_model_dir: str) -> None:
    """Metrics are the mean of both, as GRPOTrainer's are; the tree log has both."""
    config = make_config(tmp_path, log_trees=True, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=1)
    for _ in range(2):  # a second run into the same folder writes its steps anew
        trainer = build(SpyTrainer, tiny_model_dir, config)
        trainer.train()
        totals = [sum(tree.num_leaf_tokens for tree in trees) for trees in trainer.all_trees]
        assert len(totals) == 2
        assert logs_of(trainer, "tree/leaf_tokens") == [pytest.approx(sum(totals) / 2)]
        lines = (tmp_path / "trees/trees_000000.jsonl").read_text().splitlines()
        assert [json.loads(line)["tree"] for line in lines] == [
            t.to_dict() for trees in trainer.all_trees for t in trees
        ]


def test_tree_log_reads_back(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_trees=True))
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
            assert record["rows"] == tree.leaves
            assert record["rewards"] == pytest.approx(generation["rewards"][4 * i : 4 * i + 4, 0].tolist())
            expected = expected_advantages(generation, "group")[4 * i : 4 * i + 4, 0]
            assert record["advantages"] == pytest.approx(expected.tolist(), abs=1e-4)
            for leaf, reward in zip(record["rows"], record["rewards"], strict=True):
                assert parity_reward([read.completion_ids(leaf)])[0] == pytest.approx(reward, abs=1e-5)
