"""Fixtures of the commands' tests."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sample_runs import PROMPTS
from tests.support.train_runs import write_files


@pytest.fixture
def prompts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's working folder with a dataset of prompts; nothing on standard input."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.fixture
def training_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's working folder: a dataset, a module of rewards, and no package."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_rewards", "my_game"):
        sys.modules.pop(name, None)
