"""A training whose process ends goes on from its last whole checkpoint, as if nothing had been."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faults import (
    KILLED,
    LAST_SAVED,
    assert_same_training,
    die,
    output_of,
    run_in_process,
    syncing_training,
    training,
)
from treepo_trl.checkpoints import only_training_in


def resume(folder: Path, model: str, job: Callable[..., None] = training) -> str:
    """Train on in a folder; what was printed."""
    assert run_in_process(job, folder, model, None, True) == 0, output_of(folder)
    return output_of(folder)


@pytest.mark.parametrize("fault", KILLED)
def test_kill_9_loses_nothing_but_the_step(whole: Path, tmp_path: Path, tiny_model_dir: str, fault: str) -> None:
    assert run_in_process(training, tmp_path, tiny_model_dir, fault) == -signal.SIGKILL
    printed = resume(tmp_path, tiny_model_dir)
    assert ("is not intact and is passed over" in printed) is fault.startswith("save")
    assert_same_training(tmp_path, whole)


def test_kill_9_during_a_synchronization(tmp_path: Path, tiny_model_dir: str) -> None:
    """The adapter on its way stays in shared memory until the next start, which removes it."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for each in (whole, folder):
        each.mkdir()
    assert run_in_process(syncing_training, whole, tiny_model_dir) == 0, output_of(whole)
    assert run_in_process(syncing_training, folder, tiny_model_dir, "sync") == -signal.SIGKILL
    (left,) = (folder / "shared memory").iterdir()
    assert (left / "adapter_model.safetensors").exists()
    resume(folder, tiny_model_dir, syncing_training)
    assert not left.exists()
    assert_same_training(folder, whole)


def test_a_full_disk_loses_nothing_but_the_step(whole: Path, tmp_path: Path, tiny_model_dir: str) -> None:
    assert run_in_process(training, tmp_path, tiny_model_dir, "full disk") == 1
    assert "File too large" in output_of(tmp_path)
    assert not (tmp_path / f"checkpoint-{LAST_SAVED + 1}/trainer_state.json").exists()
    resume(tmp_path, tiny_model_dir)
    assert_same_training(tmp_path, whole)


def holder(folder: Path) -> None:
    """Die as a training whose reward function has left a process behind."""
    with only_training_in(str(folder), True):
        left = os.fork()
        if left == 0:
            time.sleep(60)
            os._exit(0)
        (folder / "left").write_text(str(left))
        die()


def test_a_process_left_behind_does_not_hold_the_folder(tmp_path: Path) -> None:
    training = os.fork()
    if training == 0:
        try:
            holder(tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(training, 0)[1]) == -signal.SIGKILL
    left = int((tmp_path / "left").read_text())
    try:
        os.kill(left, 0)  # it lives
        with only_training_in(str(tmp_path), True):
            pass
    finally:
        os.kill(left, signal.SIGKILL)


def test_a_child_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    """Neither its end nor its way out of the context is the end of the training."""
    training_there = only_training_in(str(tmp_path), True)
    training_there.__enter__()
    child = os.fork()
    if child == 0:
        training_there.__exit__(None, None, None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(ValueError, match="Another training"), only_training_in(str(tmp_path), True):
        pass
    training_there.__exit__(None, None, None)
    with only_training_in(str(tmp_path), True):
        pass
