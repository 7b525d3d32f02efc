"""Machines that do not answer: what is not known is said in its row, and the rest of the report is there."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.recipes import everything, recipe_of, written
from treepo_trl.apps.doctor import environment
from treepo_trl.apps.doctor.checks import check_memory
from treepo_trl.apps.doctor.findings import CannotRunError


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card")

FULL = "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the documentation.\nCompile with `DSA`."


@pytest.fixture
def full_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose memory others hold: torch sees it, and every call that needs room on it fails."""

    def fails(*_: Any) -> Any:
        raise torch.AcceleratorError(FULL)

    card = SimpleNamespace(name="A card", major=8, minor=9, shared_memory_per_block_optin=101376)
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("get_device_properties", lambda _: card),
        ("mem_get_info", fails),
        ("set_device", fails),
    ):
        monkeypatch.setattr(torch.cuda, name, value)


def test_a_full_card_is_a_row(full_card: None) -> None:
    rows = environment.environment()
    assert rows["memory"] == "unknown: AcceleratorError: CUDA error: out of memory"
    assert (rows["card"], rows["shared memory"]) == ("A card (the first of 1)", "99 KiB per block")


def test_a_card_that_does_not_describe_itself(full_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    rows = environment.environment()
    for name in ("card", "compute capability", "shared memory"):
        assert rows[name] == "unknown: RuntimeError: No CUDA GPUs are available"


def test_a_driver_that_hangs(full_card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(environment, "_DRIVER_TIMEOUT", 0.1)
    assert environment.environment()["driver"] == "unknown: nvidia-smi has not answered for 0.1 seconds"


def test_a_driver_that_does_not_start(full_card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("no program")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.environment()["driver"].startswith("unknown: OSError: ")


def test_a_recipe_is_read_on_a_full_card(full_card: None, small_model_dir: str, tmp_path: Path) -> None:
    recipe = recipe_of(written(tmp_path, model_name_or_path=small_model_dir), small_model_dir)
    with pytest.raises(CannotRunError) as error:
        check_memory(recipe)
    cause = "the card's memory cannot be read: AcceleratorError: CUDA error: out of memory"
    assert str(error.value) == cause
    assert everything(small_model_dir).uses_vllm
