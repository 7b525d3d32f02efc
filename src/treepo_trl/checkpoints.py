"""
Checkpoints: which of a run's is whole, and the generation batch in the middle of which one is written.

transformers writes `trainer_state.json` last. A process that is killed, or a full disk, leaves a folder without it.
"""

import json
import math
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


if TYPE_CHECKING:
    from trl import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer


logger = get_logger(__name__)

_STATE = "trainer_state.json"
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


# The generation batch that is under way

_BATCH = "treepo_batch"  # micro-batches so far and `_BATCH_SETTINGS`, in the state that checkpoints save
# What decides where in its batch a training is, and what the rows of a batch hold.
_BATCH_SETTINGS = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "beta",
    "use_vllm",
    "vllm_importance_sampling_correction",
)


class ResumePoint(TrainerCallback):
    """
    Where a training that is resumed goes on: at the start of the optimizer step that is under way.

    Gradients are in no checkpoint. One that is written before an optimizer step, as transformers does when the process
    is told to end, has the step's micro-batches again. One that is written in the middle of a generation batch has its
    rows, in a file per process; sampling them again would give others, with a policy that has changed.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Has the rows and the state of the training.
    """

    def __init__(self, trainer: "GRPOTrainer") -> None:
        self._trainer = trainer
        self._global_step = -1
        self._resumed_at = 0  # global step

    def on_epoch_begin(self, *args: object, **kwargs: object) -> None:
        self._move()  # before the data loader's iterator draws a random number, as a resumed training goes on

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self._follow()

    def _follow(self) -> None:
        if self._trainer.state.global_step != self._global_step:
            self._move()

    def _move(self) -> None:
        trainer = self._trainer
        self._global_step = trainer.state.global_step
        self._values = _own_values(trainer.state)
        self._num_tokens = trainer.state.num_input_tokens_seen
        self._random = _random_states(trainer.accelerator)
        self._micro_steps = cast(int, trainer._step)
        self._rows = trainer._buffered_inputs if self._micro_steps % self._window else None

    @property
    def _window(self) -> int:
        """Micro-batches that are trained on one generation batch."""
        args = cast("GRPOConfig", self._trainer.args)
        return cast(int, args.steps_per_generation) * args.num_iterations

    def _settings(self) -> dict[str, object]:
        return {name: getattr(self._trainer.args, name) for name in _BATCH_SETTINGS}

    @contextmanager
    def saved(self, trial: object) -> Iterator[None]:
        """Context in which transformers writes a checkpoint: of this point, with the rows, into a new folder."""
        trainer = self._trainer
        folder = Path(trainer._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
        self._follow()
        with written_anew(folder, trainer.accelerator, trainer.args.should_save), self._in_the_trainer():
            if self._rows is not None and not trainer.args.save_only_model:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self._rows, self._file(folder))
            yield

    @contextmanager
    def _in_the_trainer(self) -> Iterator[None]:
        """Context in which what transformers saves of the state and the random numbers is of this point."""
        state, accelerator = self._trainer.state, self._trainer.accelerator
        values, num_tokens, states = _own_values(state), state.num_input_tokens_seen, _random_states(accelerator)
        _set_own_values(state, {**self._values, _BATCH: {"micro_steps": self._micro_steps} | self._settings()})
        state.num_input_tokens_seen = self._num_tokens
        _set_random_states(accelerator, self._random)
        try:
            yield
        finally:
            _set_own_values(state, values)
            state.num_input_tokens_seen = num_tokens
            _set_random_states(accelerator, states)

    def _file(self, folder: str | Path) -> Path:
        return Path(folder, f"generation_batch_{self._trainer.accelerator.process_index}.pt")

    def restore(self, folder: str | None) -> None:
        """Bring the trainer to where a checkpoint was written, or to the start of a training."""
        trainer = self._trainer
        trainer._step, trainer._buffered_inputs = 0, None
        trainer._last_loaded_step = -1  # what vLLM holds may be of another training
        self._resumed_at = 0
        if folder is None:
            return
        state = TrainerState.load_from_json(str(Path(folder, _STATE)))
        self._resumed_at = state.global_step
        if not any(Path(folder).rglob("*optim*")):
            logger.warning(
                f"{folder} holds no state of the optimizer (`save_only_model`): optimizer and learning rate schedule "
                "start anew."
            )
        saved = cast("dict[str, Any] | None", saved_values(state).get(_BATCH))
        if saved is None:  # of stock `GRPOTrainer`, or of this one when it saved no rows
            if state.global_step * trainer.args.gradient_accumulation_steps % self._window:
                self._warn(folder, "it does not hold its rows")
            return
        changed = {name: value for name, value in self._settings().items() if saved.get(name) != value}
        is_inside = saved["micro_steps"] % (saved["steps_per_generation"] * saved["num_iterations"])
        if changed:
            if is_inside:
                self._warn(folder, ", ".join(f"`{k}` was {saved.get(k)} and is {v}" for k, v in changed.items()))
            return
        trainer._step = saved["micro_steps"]
        if is_inside:
            self._load_rows(folder)

    def _load_rows(self, folder: str) -> None:
        trainer, reason = self._trainer, None
        device = trainer.accelerator.device
        try:
            rows = torch.load(self._file(folder), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            rows, reason = None, f"its rows cannot be read ({error})"
        reasons = [each for each in cast("list[str | None]", gather_object([reason])) if each is not None]
        if reasons:  # on any process: they sample together
            self._warn(folder, reasons[0])
        else:
            trainer._buffered_inputs = cast("list[dict[str, torch.Tensor]]", send_to_device(rows, device))

    def after_epochs(self, loader: DataLoader) -> DataLoader:
        """
        A data loader of the training that gives the epoch that is under way the order that it has.

        TRL's sampler draws the orders of all epochs from one generator, one after another, and a new one starts with
        the first: a training that is resumed in a later epoch would have prompts again, and others never.
        """
        if self._resumed_at > 0 and not isinstance(loader.dataset, torch.utils.data.IterableDataset):
            sampler: Any = loader
            while hasattr(sampler, "batch_sampler"):  # accelerate wraps it, once or twice
                sampler = sampler.batch_sampler
            steps = math.ceil(len(loader) / self._trainer.args.gradient_accumulation_steps)
            for _ in range(self._resumed_at // max(steps, 1)):
                next(iter(sampler.sampler), None)
        return loader

    def _warn(self, folder: str, reason: str) -> None:
        logger.warning(
            f"{folder} was written in the middle of a generation batch, and {reason}. The rest of that batch is left "
            "out and a new one is sampled: this is not the curve of a training that was not interrupted."
        )


def _own_values(state: TrainerState) -> dict[str, object]:
    return {name: value for name, value in saved_values(state).items() if name.startswith("treepo_")}


def _set_own_values(state: TrainerState, values: dict[str, object]) -> None:
    saved = saved_values(state)
    for name in _own_values(state):
        del saved[name]
    saved.update(values)


def _random_states(accelerator: Accelerator) -> tuple[Any, ...]:
    """States of the generators that `_save_rng_state` of transformers saves."""
    device = accelerator.device.type
    own = None if device == "cpu" else torch.get_device_module(device).get_rng_state()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), own


def _set_random_states(accelerator: Accelerator, states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.get_device_module(accelerator.device.type).set_rng_state(states[3])
