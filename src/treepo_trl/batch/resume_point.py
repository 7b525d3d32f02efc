"""
Where in its generation batch a training is, in its checkpoints: one that is resumed is the same, number for number.

What `GRPOTrainer` keeps of the batch that is under way lies in attributes of the trainer, which no checkpoint holds.
"""

import math
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from treepo_trl.checkpoints.folders import (
    STATE_FILE,
    missing_states,
    named_again,
    saved_values,
    warn_of_earlier_checkpoints,
    written_anew,
)
from treepo_trl.trl.host import Host

from .source import TreeSource
from .tree_batch import SamplingUnderWay


logger = get_logger(__name__)

_BATCH = "treepo_batch"  # micro-batches so far and `_BATCH_SETTINGS`, in the state that checkpoints save
# What decides where in its batch a training is, and what the rows of a batch hold.
_BATCH_SETTINGS = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "temperature",  # of the log-probabilities
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
        host ([`Host`]):
            Has the rows and the state of the training.
        source ([`TreeSource`]):
            Has the next batch where that is being sampled.
    """

    def __init__(self, host: Host, source: TreeSource) -> None:
        self._host, self._source = host, source
        self._global_step = -1
        self._resumed_at = 0  # global step

    def on_epoch_begin(self, *args: object, **kwargs: object) -> None:
        self._move()  # before the data loader's iterator draws a random number, as a resumed training goes on

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self._follow()

    def _follow(self) -> None:
        if self._host.state.global_step != self._global_step:
            self._move()

    def _move(self) -> None:
        host = self._host
        self._global_step = host.state.global_step
        self._values = _own_values(host.state)
        self._num_tokens = host.state.num_input_tokens_seen
        self._random = _random_states(host.accelerator)
        self._micro_steps = host.micro_steps
        self._rows = host.buffered_rows if self._micro_steps % self._window else None
        self._next_batch = self._source.pending

    @property
    def _window(self) -> int:
        """Micro-batches that are trained on one generation batch."""
        return self._host.args.micro_steps_per_batch

    def _settings(self) -> dict[str, object]:
        return {name: getattr(self._host.args, name) for name in _BATCH_SETTINGS}

    @contextmanager
    def saved(self, trial: object) -> Iterator[None]:
        """Context in which transformers writes a checkpoint: of this point, with the rows, into a new folder."""
        host = self._host
        folder = Path(host.checkpoint_parent(trial), f"{PREFIX_CHECKPOINT_DIR}-{host.state.global_step}")
        self._follow()
        is_next_lost = False
        with written_anew(folder, host.accelerator, host.args.should_save), self._in_the_trainer():
            if self._rows is not None and not host.args.save_only_model:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self._rows, self._file(folder))
            if self._next_batch is not None and not host.args.save_only_model:
                is_next_lost = not self._write_next(self._next_batch, folder)
            yield
        if is_next_lost:
            host.accelerator.wait_for_everyone()  # a process that ends with the error may end the others

    def _write_next(self, batch: SamplingUnderWay, folder: Path) -> bool:
        """Write a batch that is sampled ahead, unless that has failed: the update before it is not to be lost too."""
        error = batch.error()
        if error is None:
            folder.mkdir(parents=True, exist_ok=True)
            batch.write(self._next_file(folder))
            return True
        logger.warning(
            f"{folder} is written without the batch that was being sampled ahead: {type(error).__name__}: {error}. "
            "The step that needs it ends with this error. A training that is resumed samples it anew, from a "
            "policy that is one update newer."
        )
        return False

    @contextmanager
    def _in_the_trainer(self) -> Iterator[None]:
        """Context in which what transformers saves of the state and the random numbers is of this point."""
        state, accelerator = self._host.state, self._host.accelerator
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
        return Path(folder, f"generation_batch_{self._host.accelerator.process_index}.pt")

    def _next_file(self, folder: str | Path) -> Path:
        return Path(folder, f"next_batch_{self._host.accelerator.process_index}.json")

    def restore(self, folder: str | None) -> str | None:
        """
        Bring the trainer to where a checkpoint was written, or to the start of a training.

        Returns:
            `str`, *optional*: the folder that transformers is to load the rest from.
        """
        host = self._host
        host.micro_steps, host.buffered_rows = 0, None
        host.is_loaded = False  # what vLLM holds may be of another training
        host.forget_window()
        self._resumed_at = 0
        output_dir = str(host.args.output_dir)
        if folder is None:
            warn_of_earlier_checkpoints(output_dir)
            return None
        folder = named_again(folder, output_dir, host.accelerator, host.args.should_save)
        state = TrainerState.load_from_json(str(Path(folder, STATE_FILE)))
        self._resumed_at = state.global_step
        self._warn_of_states(folder)
        self._restore_batch(folder, state)
        return folder

    def _warn_of_states(self, folder: str) -> None:
        """Say what of a training its checkpoint does not hold."""
        args, accelerator = self._host.args, self._host.accelerator
        missing = missing_states(folder, accelerator.process_index, accelerator.num_processes)
        if missing:
            logger.warning(
                f"{folder} holds no state of {', nor of '.join(missing)} (`save_only_model` leaves them out). What is "
                "missing starts anew, optimizer and schedule together: this is not the curve of a training that was "
                "not interrupted."
            )
        if args.sync_ref_model and args.beta != 0:
            logger.warning(
                "`sync_ref_model=True`: checkpoints do not hold the reference model. It starts anew from the initial "
                "weights: this is not the curve of a training that was not interrupted."
            )

    def _restore_batch(self, folder: str, state: TrainerState) -> None:
        host = self._host
        saved = cast("dict[str, Any] | None", saved_values(state).get(_BATCH))
        if saved is None:  # of stock `GRPOTrainer`, or of this one when it saved no rows
            if state.global_step * host.args.gradient_accumulation_steps % self._window:
                self._warn(folder, "it does not hold its rows")
            return
        # What an older checkpoint does not say is taken as unchanged.
        changed = {name: value for name, value in self._settings().items() if saved.get(name, value) != value}
        is_inside = saved["micro_steps"] % (saved["steps_per_generation"] * saved["num_iterations"])
        if changed:
            if is_inside:
                self._warn(folder, ", ".join(f"`{k}` was {saved[k]} and is {v}" for k, v in changed.items()))
            return
        host.micro_steps = saved["micro_steps"]
        if is_inside:
            self._load_rows(folder)
        self._source.restore(self._next_file(folder))

    def _load_rows(self, folder: str) -> None:
        host, reason = self._host, None
        device = host.accelerator.device
        try:
            rows = torch.load(self._file(folder), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            rows, reason = None, f"its rows cannot be read ({error})"
        reasons = [each for each in cast("list[str | None]", gather_object([reason])) if each is not None]
        if reasons:  # on any process: they sample together
            self._warn(folder, reasons[0])
        else:
            host.buffered_rows = cast("list[dict[str, torch.Tensor]]", send_to_device(rows, device))

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
            steps = math.ceil(len(loader) / self._host.args.gradient_accumulation_steps)
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
