"""Fixtures of the commands' tests."""

from pathlib import Path

import pytest

from tests.support.sample_runs import enter_folder


@pytest.fixture
def prompts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder with a dataset of prompts; nothing on standard input."""
    enter_folder(tmp_path, monkeypatch)
    return tmp_path
