"""A training that dies goes on from its last whole checkpoint as if nothing had been."""

import signal
from pathlib import Path

import pytest
import torch

from tests.support.faults import FAULTS, LAST_SAVED, STEPS, curve, final_weights, run_in_process, training, tree_log


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str) -> Path:
    """Folder of a training to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_in_process(training, folder, tiny_model_dir) == 0
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_but_the_step(whole: Path, tmp_path: Path, tiny_model_dir: str, fault: str) -> None:
    status = run_in_process(training, tmp_path, tiny_model_dir, fault)
    assert status == (1 if fault == "full disk" else -signal.SIGKILL)
    assert not (tmp_path / "logged.json").exists()
    assert run_in_process(training, tmp_path, tiny_model_dir, None, True) == 0
    assert len(curve(tmp_path)) == STEPS
    assert curve(tmp_path) == [pytest.approx(log, abs=1e-6) for log in curve(whole)]
    torch.testing.assert_close(final_weights(tmp_path), final_weights(whole), rtol=0, atol=1e-6)
    assert tree_log(tmp_path) == tree_log(whole)
