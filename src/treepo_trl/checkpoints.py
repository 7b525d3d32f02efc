"""
The checkpoints in a training's folder: which of them is whole, and whose they are.

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
from typing import cast

from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .file_lock import lock, unlock


logger = get_logger(__name__)

STATE_FILE = "trainer_state.json"
_BEFORE = "before-"  # an intact checkpoint while another one of its number is written
_NAME = re.compile(rf"({_BEFORE})?{PREFIX_CHECKPOINT_DIR}-(\d+)")


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


def checkpoint_to_resume(resume: str | bool | None, output_dir: str) -> str | None:
    """
    The folder that `resume_from_checkpoint` asks for; `None` if a training starts anew.

    Raises:
        ValueError: if there is no intact checkpoint, with what is missing.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        folder = newest_checkpoint(output_dir)
        if folder is None:
            raise ValueError(
                f"`resume_from_checkpoint=True`, but `output_dir` ({output_dir}) holds no intact checkpoint. Unset it "
                "to start anew, or name another folder."
            )
        return folder
    reason = why_not_intact(resume)
    if reason is not None:
        raise ValueError(
            f"`resume_from_checkpoint={resume}`: the checkpoint is not intact: {reason} Name another one, or set "
            "`True`: the newest one in `output_dir` that is intact."
        )
    return resume


def why_not_intact(folder: str) -> str | None:
    """What of a checkpoint is missing or truncated, in a sentence; `None` if nothing is. No weights are read."""
    path = Path(folder)
    if not path.is_dir():
        return "There is no such folder."
    try:
        state: object = json.loads((path / STATE_FILE).read_text())
    except FileNotFoundError:
        return f"{STATE_FILE} is missing, which is written last."
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} cannot be read: {error}."
    if not isinstance(state, dict) or not isinstance(cast("dict[str, object]", state).get("global_step"), int):
        return f"{STATE_FILE} does not say `global_step`."
    return _missing_weights(path) or _truncated_file(path)


def _missing_weights(path: Path) -> str | None:
    for index in path.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError) as error:
            return f"{index.name} cannot be read: {error}."
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            return f"{', '.join(missing)} is missing, which {index.name} names."
    # DeepSpeed, FSDP and further adapters have folders of their own.
    if not any(file.is_dir() or file.suffix == ".safetensors" or file.match("*model*.bin") for file in path.iterdir()):
        return "It holds no weights."
    return None


def _truncated_file(path: Path) -> str | None:
    for file in sorted(path.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # compares the header with the file's size
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is truncated: {error}."
    for pattern in ("*.pt", "*.pth", "*model*.bin"):
        for file in sorted(path.rglob(pattern)):
            if not zipfile.is_zipfile(file):  # `torch.save` writes the list of contents last
                return f"{file.name} is truncated."
    return None


@contextmanager
def written_anew(folder: Path, accelerator: Accelerator, should_save: bool) -> Iterator[None]:
    """
    Context in which a checkpoint is written: into a new folder, not over an older one of the same number.

    transformers writes file by file into the folder that is there: until it is done, the older `trainer_state.json`
    would vouch for files of both. An older one that is intact stays until the new one is.

    Args:
        folder (`Path`):
            The checkpoint's, on every process.
        should_save (`bool`):
            Whether this process writes what all share.
    """
    before = folder.with_name(_BEFORE + folder.name)
    if should_save and folder.exists():
        if why_not_intact(str(folder)) is None:
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        else:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()  # each process writes files of its own
    yield
    if should_save:
        shutil.rmtree(before, ignore_errors=True)


# The folder of a training


@contextmanager
def only_training_in(output_dir: str, is_main_process: bool) -> Iterator[None]:
    """
    Context of a training: no other one writes its checkpoints to the same folder meanwhile.

    Raises:
        ValueError: if another one does.
    """
    if not is_main_process:
        yield
        return
    os.makedirs(output_dir, exist_ok=True)
    try:
        descriptor = os.open(output_dir, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        yield
        return
    try:
        try:
            lock(descriptor)
        except BlockingIOError:
            raise ValueError(
                f"Another training writes to `output_dir` ({output_dir}): each would write over the other's "
                "checkpoints. Name another folder, or wait for its end."
            ) from None
        except OSError:  # no locks there
            yield
            return
        try:
            yield
        finally:
            unlock(descriptor)
    finally:
        os.close(descriptor)


def warn_of_earlier_checkpoints(output_dir: str) -> None:
    """Say that a folder in which a training starts anew holds checkpoints: the next resume may take one of these."""
    earlier = sorted(path.name for path in Path(output_dir).glob("*") if _NAME.fullmatch(path.name))
    if earlier:
        logger.warning(
            f"`output_dir` ({output_dir}) holds checkpoints of an earlier training ({', '.join(earlier)}). This one "
            "starts anew and writes beside them, and `resume_from_checkpoint=True` takes the highest number, whosever "
            "it is. Name another folder, remove them, or resume."
        )
