"""`treepo-trl plan`: what it prints, and how it ends."""

import re
from pathlib import Path

import pytest
import torch

from tests.support.sample_runs import as_flags
from treepo_trl.apps.plan.command import main


@pytest.fixture
def command(tmp_path: Path, tiny_model_dir: str) -> list[str]:
    flags = {"model_name_or_path": tiny_model_dir, "output_dir": str(tmp_path), "dataset_name": "unused"}
    flags |= {"use_vllm": "true", "dtype": "bfloat16", "per_device_train_batch_size": "8"}
    return as_flags(flags)


def test_a_training_that_fits(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*command, "--card_gib", "24"])
    output = capsys.readouterr().out
    assert "policy: weights" in output
    assert re.search(r"^card +24\.00 GiB$", output, flags=re.MULTILINE)
    assert output.strip().endswith("It fits.")


def test_a_training_that_does_not_fit(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([*command, "--card_gib", "1"])
    assert error.value.code == 1
    assert "The update takes" in capsys.readouterr().out


def test_the_card_is_this_machines_unless_it_is_given(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match=r"treepo-trl: error: This machine has no GPU.*--card_gib 24"):
            main(command)
    monkeypatch.setattr("treepo_trl.apps.plan.command.this_card", lambda: 20 * 2**30)
    main(command)
    assert re.search(r"^card +20\.00 GiB$", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="treepo-trl: error: No model: give `--model_name_or_path`"):
        main(["--card_gib", "24"])


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "0"])
def test_a_card_has_some_memory(command: list[str], size: str) -> None:
    with pytest.raises(SystemExit, match=rf"treepo-trl: error: `card_gib` is {size}.*; it must be "):
        main([*command, "--card_gib", size])
