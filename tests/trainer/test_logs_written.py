"""Metrics and tree logs of a training against its trees."""

import errno
import json
import re
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainers import SpyTrainer, expected_advantages, logs_of, make_config, parity_reward, trained
from treepo_trl import SegmentTree, tree_log
from treepo_trl.metrics import tree_metrics, tree_totals
from treepo_trl.sampling.sampler import SamplingStats
from treepo_trl.tree_log import TreeLogLine, read_trees, write_trees


def test_tree_metrics_are_those_of_the_trees(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, stop_repetition=False))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(trainer.all_trees) == 2
    for log, trees in zip(logs, trainer.all_trees, strict=True):
        for name, value in tree_metrics(tree_totals(trees, SamplingStats())).items():
            if not any(part in name for part in ("decoded", "fallback", "seconds", "serial")):  # not in the trees
                assert log[name] == pytest.approx(value), name
        assert log["tree/decoded_tokens"] == log["tree/unique_tokens"]  # nothing is cut without a stop pattern
        assert log["tree/fallback_frac"] == 0
        assert log["tree/serial_segments"] == log["tree/longest_path"] <= 3  # nothing is decoded behind the others
        assert log["tree/engine_seconds"] > 0
        assert log["tree/sampler_seconds"] >= 0
        assert log["completions/mean_length"] == pytest.approx(log["tree/leaf_tokens"] / log["tree/leaves_mean"] / 2)
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
    config = make_config(tmp_path, log_trees=True, advantage_estimator="treepo")
    trainer = trained(SpyTrainer, tiny_model_dir, config)
    files = sorted((tmp_path / "trees").iterdir())
    assert [file.name for file in files] == ["trees_000000.jsonl", "trees_000001.jsonl"]
    for step, (file, generation) in enumerate(zip(files, trainer.generations, strict=True)):
        records: Any = list(read_trees(file))
        assert len(records) == 2
        for i, (record, tree) in enumerate(zip(records, generation["trees"], strict=True)):
            assert record["step"] == step
            read = SegmentTree.from_dict(record["tree"])
            assert read.to_dict() == tree.to_dict()
            assert record["prompt"] == generation["inputs"][4 * i]["prompt"]
            assert record["rows"] == tree.leaves
            assert record["rewards"] == pytest.approx(generation["rewards"][4 * i : 4 * i + 4, 0].tolist())
            expected = expected_advantages(generation, "group", "treepo", weighting="uniform")[4 * i : 4 * i + 4, 0]
            assert record["advantages"] == pytest.approx(expected.tolist(), abs=1e-4)
            for leaf, reward in zip(record["rows"], record["rewards"], strict=True):
                assert parity_reward([read.completion_ids(leaf)])[0] == pytest.approx(reward, abs=1e-5)


# A log that cannot be written


LINE: TreeLogLine = {
    "step": 0,
    "prompt": "w1",
    "rows": [0],
    "rewards": [None],
    "advantages": [0.5],
    "tree": {
        "prompt_ids": [6],
        "nodes": [{"parent": None, "token_ids": [9, 0], "logprobs": None, "finish_reason": "stop"}],
        "leaves": [0],
    },
}


class FullDisk(FileIO):
    """A file with room for half of what is written."""

    def write(self, data: Any) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[: len(data) - 99])


def test_a_lost_log_is_a_warning_once_until_a_log_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No half line is left, neither where the disk is full nor before what is written later."""

    def write_step(step: int, fails: bool, is_first: bool = True) -> None:
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(tree_log, "open", lambda path, mode, **_: FullDisk(path, mode), raising=False)
            write_trees([{**LINE, "step": step}] * 2, str(tmp_path), step, is_first)

    write_step(0, fails=False)
    for step in (0, 1, 2):
        write_step(step, fails=True, is_first=step > 0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        f"The trees of step 0 are lost: No space left on device. `log_trees` writes them to {tmp_path / 'trees'}."
    )
    write_step(2, fails=False, is_first=False)
    counts = [sum(1 for _ in read_trees(tmp_path / f"trees/trees_{step:06d}.jsonl")) for step in range(3)]
    assert counts == [2, 0, 2]
    write_step(3, fails=True)
    assert len(caplog.records) == 2


# Reading


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": -1}, "`step` is -1; it must be a whole number"),
        ({"prompt": None}, "`prompt` is None; it must be a text"),
        ({"rows": [1]}, "`rows` names other nodes than `leaves`"),
        ({"rows": [-1]}, r"`rows\[0\]` is -1"),
        ({"rewards": [float("nan")]}, r"`rewards\[0\]` is nan; it must be null or a finite number"),
        ({"rewards": []}, "`rewards` has 0 values, and the tree 1 leaves"),
        ({"advantages": [None]}, r"`advantages\[0\]` is None; it must be a finite number"),
        ({"tree": None}, "The tree is None; it must be an object"),
        ({"weights": [1.0]}, "the line has an unknown field 'weights'; known are advantages, prompt, "),
        (
            {"tree": {**LINE["tree"], "nodes": [{**LINE["tree"]["nodes"][0], "finish_reason": None}], "leaves": []}},
            r"`nodes\[0\]` has neither a finish reason nor children",
        ),
    ],
)
def test_a_line_that_no_training_writes_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps({**LINE, **changes}) + "\n")
    lines = read_trees(path)
    assert next(lines) == LINE
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 2: {words}"):
        next(lines)
