"""Which folder a training is resumed from, and how one is written without losing another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import save_file

from treepo_trl.checkpoints.folders import (
    checkpoint_to_resume,
    named_again,
    newest_checkpoint,
    why_not_intact,
    written_anew,
)


@pytest.fixture(autouse=True)
def state() -> None:
    """Warnings of a training go through accelerate, which must know its processes."""
    PartialState()


def fake_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.zeros(1000)}, folder / "model.safetensors")
    torch.save({"state": torch.zeros(1000)}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 4, "train_batch_size": 2}')
    return folder


def cut(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_truncated_file_is_found(tmp_path: Path, file: str) -> None:
    checkpoint = fake_checkpoint(tmp_path / "checkpoint-4")
    assert why_not_intact(str(checkpoint)) is None
    for size in (checkpoint / file).stat().st_size * torch.tensor([0.99, 0.5, 0.01, 0.0]):
        cut(checkpoint / file, int(size))
        assert file in str(why_not_intact(str(checkpoint)))


@pytest.mark.parametrize("missing", ["model.safetensors", "trainer_state.json", "shard", "folder"])
def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path: Path, missing: str) -> None:
    checkpoint = fake_checkpoint(tmp_path / "checkpoint-4")
    expected = {"model.safetensors": "no weights", "shard": "model-2.safetensors", "folder": "no such folder"}
    if missing == "folder":
        shutil.rmtree(checkpoint)
    elif missing == "shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (checkpoint / missing).unlink()
    with pytest.raises(ValueError, match=expected.get(missing, missing)):
        checkpoint_to_resume(str(checkpoint), str(tmp_path))
    with pytest.raises(ValueError, match="holds no intact checkpoint"):
        checkpoint_to_resume(True, str(tmp_path))
    assert checkpoint_to_resume(None, str(tmp_path)) is checkpoint_to_resume(False, str(tmp_path)) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *[("model.safetensors.index.json", text) for text in ("[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}')],
        *[
            ("trainer_state.json", text)
            for text in ("[]", '{"global_step": 2}', '{"train_batch_size": 2}', '{"a": 1}')
        ],
    ],
)
def test_a_file_that_says_something_else_is_found(tmp_path: Path, file: str, content: str) -> None:
    checkpoint = fake_checkpoint(tmp_path / "checkpoint-4")
    (checkpoint / file).write_text(content)
    assert str(why_not_intact(str(checkpoint))).startswith(file)


def test_files_of_callbacks_are_not_judged(tmp_path: Path) -> None:
    checkpoint = fake_checkpoint(tmp_path / "checkpoint-4")
    for name in ("probe.pt", "probe.pth", "reward_model.bin", "probe.index.json"):
        (checkpoint / name).write_bytes(b"a pickle of its own")
    assert why_not_intact(str(checkpoint)) is None


def test_what_else_asks_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = fake_checkpoint(tmp_path / "checkpoint-4")
    assert checkpoint_to_resume(checkpoint, str(tmp_path)) == str(checkpoint)
    for resume in (0, 1, ["checkpoint-4"]):
        with pytest.raises(ValueError, match=r"neither `True`.* nor `False`.* nor the path"):
            checkpoint_to_resume(resume, str(tmp_path))


def test_the_newest_intact_checkpoint_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(str(tmp_path / "nowhere")) is None
    for step in (9, 10, 100):
        fake_checkpoint(tmp_path / f"checkpoint-{step}")
    fake_checkpoint(tmp_path / "checkpoint-200-of-mine")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")
    assert caplog.text == ""
    (tmp_path / "checkpoint-100/trainer_state.json").unlink()
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert f"{tmp_path / 'checkpoint-100'} is not intact and is passed over" in caplog.text


@pytest.mark.parametrize("is_intact", [True, False])
def test_a_checkpoint_is_not_written_over_another_one(tmp_path: Path, is_intact: bool) -> None:
    """An intact one of the same number is there until the new one is."""
    folder = fake_checkpoint(tmp_path / "checkpoint-4")
    if not is_intact:
        cut(folder / "optimizer.pt", 100)

    def write_half() -> None:
        with written_anew(folder, Accelerator(cpu=True), should_save=True):
            assert not list(folder.glob("*"))
            folder.mkdir(exist_ok=True)
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError("full")

    for _ in range(2):  # the second time the first attempt's half is there
        with pytest.raises(OSError, match="full"):
            write_half()
        newest = newest_checkpoint(str(tmp_path))
        assert newest == (str(tmp_path / "before-checkpoint-4") if is_intact else None)
    with written_anew(folder, Accelerator(cpu=True), should_save=True):
        fake_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_an_older_one_that_was_set_aside_makes_room_for_the_one_that_is_written_over(tmp_path: Path) -> None:
    """A process that is killed behind a checkpoint's last file leaves both: the number is free for a third one."""
    folder, before = fake_checkpoint(tmp_path / "checkpoint-4"), fake_checkpoint(tmp_path / "before-checkpoint-4")
    (folder / "second").touch()
    (before / "first").touch()
    with written_anew(folder, Accelerator(cpu=True), should_save=True):
        assert not folder.exists()
        assert newest_checkpoint(str(tmp_path)) == str(before)
        assert (before / "second").exists()
        assert not (before / "first").exists()
        fake_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert not (folder / "second").exists()


def test_what_was_written_before_a_save_stays(tmp_path: Path) -> None:
    """By callbacks in the same step, also beside a half of an earlier attempt."""
    folder = tmp_path / "checkpoint-4"
    (folder / "samples").mkdir(parents=True)
    for name in ("checkpoint-is-incomplete.txt", "samples/model.safetensors", "probe.pt"):
        (folder / name).write_text("mine")
    for _ in range(2):
        with written_anew(folder, Accelerator(cpu=True), should_save=True):
            assert len([path for path in folder.rglob("*") if path.is_file()]) == 3
            (folder / "optimizer.pt").write_bytes(b"half")
            (folder / "global_step4").mkdir()
            (folder / "trainer_state.json").write_text("{")


def test_a_checkpoint_that_was_set_aside_takes_its_name_again(tmp_path: Path) -> None:
    """In place of the half for which it was; not of a whole one, nor outside of the training's folder."""
    accelerator = Accelerator(cpu=True)
    before, folder = str(fake_checkpoint(tmp_path / "before-checkpoint-4")), tmp_path / "checkpoint-4"
    fake_checkpoint(folder)
    assert named_again(before, str(tmp_path), accelerator, True) == before
    cut(folder / "model.safetensors", 10)
    assert newest_checkpoint(str(tmp_path)) == before
    assert named_again(before, str(tmp_path / "other"), accelerator, True) == before
    assert named_again(before, str(tmp_path), accelerator, True) == str(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert named_again(str(folder), str(tmp_path), accelerator, True) == str(folder)
    assert why_not_intact(str(folder)) is None
