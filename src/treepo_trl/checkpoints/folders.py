"""
The checkpoints in a training's folder: which of them is whole, and how one is written.

transformers writes `trainer_state.json` last. A process that is killed, or a full disk, leaves a folder without it.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = get_logger(__name__)

STATE_FILE = "trainer_state.json"
_BEFORE = "before-"  # an intact checkpoint while another one of its number is written
_NAME = re.compile(rf"({_BEFORE})?{PREFIX_CHECKPOINT_DIR}-(\d+)")

# Names that a save gives. What else lies in a checkpoint is of callbacks and the like, whatever its suffix.
_TORCH_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin")
_TORCH_FILES = (
    *_TORCH_WEIGHTS,
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "generation_batch_*.pt",
)
_SAVED = (
    *_TORCH_FILES,
    STATE_FILE,
    "next_batch_*.json",
    "model*.safetensors",
    "adapter_model*.safetensors",
    "*model*.index.json",
    # DeepSpeed and FSDP, in folders
    "global_step*",
    "pytorch_model_fsdp*",
    "optimizer_[0-9]*",
)
# What continues a training besides its weights, if any of these is there.
_STATES = {
    "the optimizer": ("*optimizer.pt*", "optimizer.bin", "optimizer_[0-9]*", "global_step*"),
    "the learning rate schedule": ("scheduler.pt", "global_step*"),
}


def saved_values(state: TrainerState) -> dict[str, object]:
    """The part of a trainer's state that checkpoints save under names of one's own."""
    return cast("dict[str, object]", state.stateful_callbacks)


# Which one is whole


def newest_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that is intact. Those that are passed over are told with the reason."""
    names = [_NAME.fullmatch(path.name) for path in Path(output_dir).glob("*")]
    for name in sorted(filter(None, names), key=lambda name: (int(name[2]), name[1] is None), reverse=True):
        folder = Path(output_dir, name[0])
        reason = why_not_intact(str(folder))
        if reason is None:
            return str(folder)
        logger.warning(f"{folder} is not intact and is passed over: {reason}")
    return None


def checkpoint_to_resume(resume: object, output_dir: str) -> str | None:
    """
    The folder that `resume_from_checkpoint` asks for; `None` if a training starts anew.

    Raises:
        ValueError: if there is no intact checkpoint, with what is missing, or if `resume` is no such setting.
    """
    if resume is None or resume is False:
        return None
    if not isinstance(resume, bool | str | os.PathLike):
        raise ValueError(
            f"`resume_from_checkpoint={resume!r}` is neither `True` (the newest intact checkpoint in `output_dir`) "
            "nor `False` (start anew) nor the path of a checkpoint. Set one of these."
        )
    if resume is True:
        folder = newest_checkpoint(output_dir)
        if folder is None:
            raise ValueError(
                f"`resume_from_checkpoint=True`, but `output_dir` ({output_dir}) holds no intact checkpoint. Unset it "
                "to start anew, or name another folder."
            )
        return folder
    folder = os.fspath(cast("str | os.PathLike[str]", resume))
    reason = why_not_intact(folder)
    if reason is not None:
        raise ValueError(
            f"`resume_from_checkpoint={folder}`: the checkpoint is not intact: {reason} Name another one, or set "
            "`True`: the newest one in `output_dir` that is intact."
        )
    return folder


def why_not_intact(folder: str) -> str | None:
    """What of a checkpoint is missing or truncated, in a sentence; `None` if nothing is. No weights are read."""
    path = Path(folder)
    if not path.is_dir():
        return "There is no such folder."
    try:
        state: Any = json.loads((path / STATE_FILE).read_text())
        TrainerState(**state)
    except FileNotFoundError:
        return f"{STATE_FILE} is missing, which is written last."
    except (OSError, ValueError, TypeError) as error:
        return f"{STATE_FILE} cannot be read: {error}."
    for name in ("global_step", "train_batch_size"):  # transformers computes with them
        if not isinstance(state.get(name), int):
            return f"{STATE_FILE} does not say `{name}`."
    return _missing_weights(path) or _truncated_file(path)


def _missing_weights(path: Path) -> str | None:
    for index in path.glob("*model*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
            missing = sorted(shard for shard in shards if not (path / shard).is_file())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{index.name} cannot be read: {error}."
        if missing:
            return f"{', '.join(missing)} is missing, which {index.name} names."
    # DeepSpeed, FSDP and further adapters have folders of their own.
    has_weights = any(file.is_dir() or file.suffix == ".safetensors" for file in path.iterdir())
    return None if has_weights or any(_matching(path, _TORCH_WEIGHTS)) else "It holds no weights."


def _truncated_file(path: Path) -> str | None:
    for file in sorted(path.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # compares the header with the file's size
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is truncated: {error}."
    for file in _matching(path, tuple(f"**/{pattern}" for pattern in _TORCH_FILES)):
        if not zipfile.is_zipfile(file):  # `torch.save` writes the list of contents last
            return f"{file.name} is truncated."
    return None


def missing_states(folder: str, process_index: int, num_processes: int) -> list[str]:
    """What a checkpoint does not hold of the state of a training, and transformers starts anew without a word."""
    missing = [name for name, patterns in _STATES.items() if not _matching(Path(folder), patterns)]
    file = f"rng_state_{process_index}.pth" if num_processes > 1 else "rng_state.pth"
    return missing if Path(folder, file).is_file() else [*missing, "the random numbers"]


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


# How one is written


@contextmanager
def written_anew(folder: Path, accelerator: Accelerator, should_save: bool) -> Iterator[None]:
    """
    Context in which a checkpoint is written: into a new folder, not over an older one of the same number.

    transformers writes file by file into the folder that is there: until it is done, the older `trainer_state.json`
    would vouch for files of both. An older one that is intact stays until the new one is. Of one that is not, what a
    save has written goes. What callbacks have written into the folder before the save is not touched.

    Args:
        folder (`Path`):
            The checkpoint's, on every process.
        should_save (`bool`):
            Whether this process writes what all share.
    """
    before = folder.with_name(_BEFORE + folder.name)
    if should_save and why_not_intact(str(folder)) is None:
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    elif should_save:
        for file in _matching(folder, _SAVED):
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()
    accelerator.wait_for_everyone()  # each process writes files of its own
    yield
    if should_save:
        shutil.rmtree(before, ignore_errors=True)


def named_again(folder: str, output_dir: str, accelerator: Accelerator, should_save: bool) -> str:
    """
    A checkpoint to resume; one that was set aside takes the place of the one that was not finished.

    Returns:
        `str`: where it lies then, on every process.
    """
    path = Path(folder)
    if not path.name.startswith(_BEFORE) or path.parent.resolve() != Path(output_dir).resolve():
        return folder
    unfinished = path.with_name(path.name.removeprefix(_BEFORE))
    accelerator.wait_for_everyone()  # all have found it
    if should_save and why_not_intact(str(unfinished)) is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
        path.rename(unfinished)
    accelerator.wait_for_everyone()
    return str(path if path.exists() else unfinished)


def warn_of_earlier_checkpoints(output_dir: str) -> None:
    """Say that a folder in which a training starts anew holds checkpoints: the next resume may take one of these."""
    earlier = sorted(path.name for path in Path(output_dir).glob("*") if _NAME.fullmatch(path.name))
    if earlier:
        logger.warning(
            f"`output_dir` ({output_dir}) holds checkpoints of an earlier training ({', '.join(earlier)}). This one "
            "starts anew and writes beside them, and `resume_from_checkpoint=True` takes the highest number, whosever "
            "it is. Name another folder, remove them, or resume."
        )
