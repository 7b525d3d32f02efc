"""
Checkpoints: which of a run's is whole.

transformers writes `trainer_state.json` last. A process that is killed, or a full disk, leaves a folder without it.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import cast

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open


logger = get_logger(__name__)

_STATE = "trainer_state.json"
_NAME = re.compile(r"(?:before-)?checkpoint-(\d+)")  # `before-`: is being written once more, see `written_anew`


def newest_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that is intact. Those that are passed over are told with the reason."""
    folders = [path for path in Path(output_dir).glob("*checkpoint-*") if _NAME.fullmatch(path.name)]
    # The newest first; the one of a number that was there before it was written anew last.
    folders.sort(key=lambda path: (int(path.name.rpartition("-")[2]), path.name.startswith("c")), reverse=True)
    for folder in folders:
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
        state: object = json.loads((path / _STATE).read_text())
    except FileNotFoundError:
        return f"{_STATE} is missing, which is written last."
    except (OSError, ValueError) as error:
        return f"{_STATE} cannot be read: {error}."
    if not isinstance(state, dict) or not isinstance(cast("dict[str, object]", state).get("global_step"), int):
        return f"{_STATE} does not say `global_step`."
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
