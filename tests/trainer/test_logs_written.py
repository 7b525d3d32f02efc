"""Metrics and tree logs of a training against its trees."""

import json
from pathlib import Path

import pytest

from tests.support.trainers import (
    SpyTrainer,
    expected_advantages,
    logs_of,
    make_config,
    parity_reward,
    trained,
)
from treepo_trl import SegmentTree
from treepo_trl.metrics import tree_metrics, tree_totals
from treepo_trl.sampling.sampler import SamplingStats


def test_tree_metrics_are_those_of_the_trees(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, stop_repetition=False))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(trainer.all_trees) == 2
    for log, trees in zip(logs, trainer.all_trees, strict=True):
        for name, value in tree_metrics(tree_totals(trees, SamplingStats())).items():
            if not any(part in name for part in ("decoded", "fallback", "seconds")):  # not in the trees
                assert log[name] == pytest.approx(value), name
        assert log["tree/decoded_tokens"] == log["tree/unique_tokens"]  # nothing is cut without a stop pattern
        assert 0 <= log["tree/fallback_frac"] <= 1
        assert log["tree/engine_seconds"] > 0
        assert log["tree/sampler_seconds"] >= 0
        assert log["completions/mean_length"] == pytest.approx(log["tree/leaf_tokens"] / 8)
    assert not (tmp_path / "trees").exists()  # unless it is asked for


def test_a_step_over_two_generations(tmp_path: Path, tiny_model_dir: str) -> None:
    """Metrics are the mean of both, as GRPOTrainer's are; the tree log has both."""
    config = make_config(tmp_path, log_trees=True, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=1)
    for _ in range(2):  # a second run into the same folder writes its steps anew
        trainer = trained(SpyTrainer, tiny_model_dir, config)
        totals = [sum(tree.num_leaf_tokens for tree in trees) for trees in trainer.all_trees]
        assert len(totals) == 2
        assert logs_of(trainer, "tree/leaf_tokens") == [pytest.approx(sum(totals) / 2)]
        lines = (tmp_path / "trees/trees_000000.jsonl").read_text().splitlines()
        assert [json.loads(line)["tree"] for line in lines] == [
            t.to_dict() for trees in trainer.all_trees for t in trees
        ]


def test_tree_log_reads_back(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_trees=True))
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
