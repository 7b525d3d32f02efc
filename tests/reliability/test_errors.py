"""An error in the middle of a training is the user's to read, and the same process can train on."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import trainers
from tests.support.faults import LAST_SAVED, STEPS, around, assert_same_training, keep_log, make_trainer
from tests.support.paths import ROOT
from treepo_trl.checkpoints import newest_checkpoint


def raise_once(error: Exception) -> Any:
    errors = [error]

    def fail(*_: Any) -> None:
        if errors:
            raise errors.pop()

    return fail


@pytest.mark.parametrize("cause", ["engine", "reward"])
def test_an_error_loses_nothing_but_the_step(whole: Path, tmp_path: Path, tiny_model_dir: str, cause: str) -> None:
    """It says where it came from, nothing is left in the engine, and the same trainer goes on."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    fail = raise_once(RuntimeError("out of order"))
    if cause == "engine":
        around(trainer, trainer.policy_engine.engine, "collect", LAST_SAVED, before=fail)
    else:

        def reward_by_kind(**columns: Any) -> list[float | None]:
            if trainer.state.global_step == LAST_SAVED:
                fail()
            return trainers.reward_by_kind(**columns)

        trainer.reward_funcs[0] = reward_by_kind
    with pytest.raises(RuntimeError, match="out of order") as raised:
        trainer.train()
    where = "While sampling prompt" if cause == "engine" else "reward_by_kind"
    assert where in "\n".join(raised.value.__notes__)
    trainer.train(resume_from_checkpoint=True)
    keep_log(trainer)
    assert_same_training(tmp_path, whole)


def test_a_full_disk_under_the_tree_log_is_a_warning(
    whole: Path, tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log of one step is lost, all else is as ever."""
    lost = f"trees_{LAST_SAVED:06d}.jsonl"
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / lost).symlink_to("/dev/full")
    trainer = make_trainer(tmp_path, tiny_model_dir)
    trainer.train()
    assert caplog.text.count(f"The trees of step {LAST_SAVED} are lost: No space left on device") == 1
    (tmp_path / "trees" / lost).unlink()
    (tmp_path / "trees" / lost).write_text((whole / "trees" / lost).read_text())
    keep_log(trainer)
    assert_same_training(tmp_path, whole)


def test_a_second_training_in_the_folder_at_once_is_refused(tmp_path: Path, tiny_model_dir: str) -> None:
    """Nothing of it is written, and the folder is free again once the first is done."""
    first = make_trainer(tmp_path, tiny_model_dir)
    second = make_trainer(tmp_path, tiny_model_dir, seed=8, max_steps=1)
    refused: list[str] = []

    def try_second() -> None:
        with pytest.raises(ValueError, match="Another training writes to `output_dir`") as raised:
            second.train()
        refused.append(str(raised.value))

    around(first, first.policy_engine.engine, "collect", LAST_SAVED, before=try_second)
    first.train()
    assert refused
    assert second.state.global_step == 0
    second.train()


def test_trainings_that_write_nothing_share_a_folder(tmp_path: Path, tiny_model_dir: str) -> None:
    changes = {"save_strategy": "no", "log_trees": False, "max_steps": 1}
    first, second = (make_trainer(tmp_path, tiny_model_dir, **changes) for _ in range(2))
    around(first, first.policy_engine.engine, "collect", 0, before=lambda *_: second.train())
    first.train()
    assert first.state.global_step == second.state.global_step == 1


def test_a_training_that_starts_anew_in_a_used_folder_says_so(
    tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each checkpoint is of one of them. What is resumed is the highest number, whosever it is."""
    make_trainer(tmp_path, tiny_model_dir).train()
    assert "earlier training" not in caplog.text
    second = make_trainer(tmp_path, tiny_model_dir, seed=8, max_steps=LAST_SAVED)
    second.train()
    assert "holds checkpoints of an earlier training (checkpoint-1, checkpoint-2, " in caplog.text
    weights = load_file(tmp_path / f"checkpoint-{LAST_SAVED}/model.safetensors")
    torch.testing.assert_close(weights["model.norm.weight"], second.model.model.norm.weight.data)
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{STEPS}")


def test_each_row_names_tests_that_exist() -> None:
    page = (ROOT / "docs/reliability.md").read_text()
    rows = page.split("| fault |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
