"""The loggers of transformers and TRL, real ones, on this machine: what a training with trees writes to them."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.train_runs import settings


LOGGERS = {"report_to": ["trackio", "tensorboard", "wandb"], "project": "trees", "run_name": "first"}


def test_metrics_and_completions_reach_the_loggers(training_folder: Path, tiny_model_dir: str) -> None:
    tmp_path = training_folder
    pytest.importorskip("trackio")
    pytest.importorskip("wandb")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = {**LOGGERS, "per_device_train_batch_size": 8, "log_completions": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(tiny_model_dir, **changes)))
    command = [sys.executable, "-m", "treepo_trl.cli", "train", "--config", "config.yaml"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]

    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    names = {f"train/{name}" for name in history[0] if name != "step"}
    assert {"train/tree/leaf_unique_ratio", "train/tree/equal_rewards_frac", "train/reward"} <= names

    reader = events.EventAccumulator(str(next((tmp_path / "out/runs").iterdir())))
    reader.Reload()
    assert names <= set(reader.Tags()["scalars"])
    values = [scalar.value for scalar in reader.Scalars("train/tree/leaf_unique_ratio")]
    assert values == pytest.approx([log["tree/leaf_unique_ratio"] for log in history[:2]])

    with closing(sqlite3.connect(tmp_path / "trackio/trees.db")) as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics WHERE run_name = 'first'")]
    assert names <= {name for row in rows for name in row}
    assert [row["train/tree/leaf_unique_ratio"] for row in rows if "train/reward" in row] == pytest.approx(values)
    assert sum("completions" in row for row in rows) == 3  # a table per log, that at the end included

    (wandb,) = (tmp_path / "wandb").glob("offline-run-*")
    (written,) = wandb.glob("*.wandb")
    assert [name for name in names if name.encode() not in written.read_bytes()] == []  # names are plain text in it
    logged = [json.loads(file.read_text()) for file in wandb.glob("files/media/table/completions_*.table.json")]
    assert all(1 < len(table["data"]) <= 8 for table in logged)  # a tree may lack leaves
    assert {"completion", "advantage"} <= set(logged[0]["columns"])

    tables = [pd.read_parquet(file) for file in sorted((tmp_path / "out/completions").iterdir())]
    assert all(1 < len(table) <= 8 for table in tables)
    assert {"prompt", "completion", "even", "advantage"} <= set(tables[0].columns)
