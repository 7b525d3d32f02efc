"""Fixtures of the commands' tests."""

import io
import json
import sys
from pathlib import Path

import pytest

from tests.support.sample_runs import PROMPTS


@pytest.fixture
def prompts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's working folder with a dataset of prompts; nothing on standard input."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
