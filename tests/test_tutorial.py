"""The tutorial, as a reader goes through it: every block in order, in one folder and one namespace."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.models import save_random_smollm2
from tests.support.pages import Runner, blocks_of
from tests.support.paths import ROOT


SHORTER = {
    "model_name_or_path: model": "model_name_or_path: random",
    "--model_name_or_path model": "--model_name_or_path random",
    "max_steps: 20": "max_steps: 2",
    "step 20)": "step 2)",
    "per_device_train_batch_size: 64 ": "per_device_train_batch_size: 16 ",
    "160 trees in": "4 trees in",
    "--max_prompts 64": "--max_prompts 2",
    "--num_generations 4 --max": "--num_generations 1 --max",
}
"""What would take minutes, and what is printed because of it."""


def test_the_tutorial_runs_and_prints_what_it_says(
    small_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """One tree from the packaged model; the commands behind it have a random one of its kind."""
    (tmp_path / "model").symlink_to(small_model_dir)
    save_random_smollm2(AutoTokenizer.from_pretrained(small_model_dir), tmp_path / "random")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    runner = Runner(SHORTER)
    request.addfinalizer(partial(torch.set_printoptions, profile="default"))  # which the page changes
    for block in blocks_of(ROOT / "docs/tutorial.md"):
        if block.why_not_run is None:
            runner.run_block(block)
    assert runner.unused == set()
    assert runner.names["rewards"].tolist() == [1, 0, 0, 0]
    assert (tmp_path / "merged/model.safetensors").exists()


def test_the_pencil_comes_to_what_the_package_computes() -> None:
    """The fractions of the page are those of its tables, and its tables those that the blocks print."""
    page = (ROOT / "docs/tutorial.md").read_text()
    for fraction, value in PENCIL.items():
        assert f"{fraction} = {value:.3f}" in page
        assert eval(fraction) == pytest.approx(value, abs=5e-4)
        assert f"{-value:.3f}" in page


PENCIL = {
    "2.41 / (2.41 + 2.12)": 0.532,
    "2.41 / (2.41 + 3.0 + 3.25)": 0.278,
    "2.41 / (2.41 + 2.12 + 3.0)": 0.320,
}


def test_a_block_that_prints_something_else_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    page = ROOT / "docs/tutorial.md"
    monkeypatch.chdir(tmp_path)
    runner = Runner({"1": "2"})
    first, *_ = [block for block in blocks_of(page) if block.language == "text"]
    runner.python("print('something else')", "here")
    with pytest.raises(AssertionError, match="something else"):
        runner.run_block(first)
    runner.python(f"print({json.dumps(first.text.strip())})", "here")
    runner.changes = {}
    runner.run_block(first)
