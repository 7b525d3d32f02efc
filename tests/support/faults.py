"""Trainings in processes of their own, and what goes wrong in them."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerState

from tests.support.trainers import build, labelled, make_config, reward_by_kind
from treepo_trl import TreePOTrainer, treepo_trainer


STEPS = 4
LAST_SAVED = 2
"""The last checkpoint that is whole when a fault comes: all faults are in the third step or its checkpoint."""

# Imports what trainings need once and forks: a process starts in a fraction of a second, with no thread of the tests'.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def run_in_process(job: Callable[..., None], *arguments: Any, timeout: float = 120) -> int | None:
    """Exit status of a function in a process of its own; minus the signal that has ended it."""
    process = _processes.Process(target=_on_one_thread, args=(job, *arguments), daemon=True)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{job.__name__}{arguments} did not end in {timeout} s")
    return process.exitcode


def _on_one_thread(job: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    job(*arguments)


def make_trainer(folder: Path, model: str, **changes: Any) -> TreePOTrainer:
    """All that keeps something between steps: dynamic sampling, two batches per rollout, a tree log, checkpoints."""
    settings = {
        "max_steps": STEPS,
        "dynamic_sampling_rounds": 2,
        "branch_schedule": "spread",
        "log_trees": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
    }
    data = {"train_dataset": labelled("cvvcvcvvccvvcv"), "reward_funcs": reward_by_kind}
    return build(TreePOTrainer, model, make_config(folder, **{**settings, **changes}), **data)


def training(folder: Path, model: str, fault: str | None = None, resume: bool = False) -> None:
    """Train in a folder; what was logged is in `logged.json` when all steps are done, an error in `error.txt`."""
    trainer = make_trainer(folder, model)
    if fault is not None:
        FAULTS[fault](trainer)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        (folder / "error.txt").write_text("\n".join([repr(error), *getattr(error, "__notes__", [])]))
        raise SystemExit(1) from None
    (folder / "logged.json").write_text(json.dumps(trainer.state.log_history[:-1]))  # the last one is about seconds


def curve(folder: Path) -> list[dict[str, float]]:
    """What a training that is done has logged, without how long it took."""
    timed = ("time", "runtime", "per_second", "seconds")
    logs = json.loads((folder / "logged.json").read_text())
    return [{key: value for key, value in log.items() if not any(word in key for word in timed)} for log in logs]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{STEPS}/model.safetensors")


def tree_log(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((folder / "trees").iterdir())}


# Faults, each in the third step or in its checkpoint


def _before_or_after(
    owner: Any, name: str, is_time: Callable[[], bool], before: Any = None, after: Any = None
) -> None:
    """Call `before` ahead of a method of `owner`, and `after` behind it, each with its arguments, when it is time."""
    method = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if before is not None and is_time():
            before(*args)
        result = method(*args, **kwargs)
        if after is not None and is_time():
            after(*args)
        return result

    setattr(owner, name, faulty)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(part: Callable[[Any], Any], name: str, when: str = "before") -> Callable[[Any], None]:
    """Kill the process at a method in the third step."""

    def plan(trainer: Any) -> None:
        _before_or_after(part(trainer), name, lambda: trainer.state.global_step == LAST_SAVED, **{when: _die})

    return plan


def _killed_writing(owner: Any, name: str, file: str) -> Callable[[Any], None]:
    """Kill the process when half of a file of the third checkpoint is there."""

    def cut_and_die(*args: Any) -> None:
        path = next(Path(arg) for arg in args if isinstance(arg, str))
        path = path / file if path.is_dir() else path
        os.truncate(path, path.stat().st_size // 2)
        _die()

    def plan(trainer: Any) -> None:
        is_time = lambda: trainer.state.global_step == LAST_SAVED + 1
        _before_or_after(owner, name, is_time, after=cut_and_die)

    return plan


def _killed_logging(trainer: Any) -> None:
    """Kill the process when half of the third step's tree log is there."""

    def cut_and_die(*_: Any) -> None:
        path = Path(trainer.args.output_dir) / f"trees/trees_{LAST_SAVED:06d}.jsonl"
        os.truncate(path, path.stat().st_size // 2)
        _die()

    is_time = lambda: trainer.state.global_step == LAST_SAVED
    _before_or_after(treepo_trainer, "write_trees", is_time, after=cut_and_die)


def _full_disk(trainer: Any) -> None:
    """Let no file of the third checkpoint grow beyond 20 kB, as if the disk were full."""

    def fill(*_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    _before_or_after(trainer, "_save_checkpoint", lambda: trainer.state.global_step == LAST_SAVED + 1, before=fill)


FAULTS: dict[str, Callable[[Any], None]] = {
    "sampling": _killed(lambda trainer: trainer.policy_engine.engine, "collect"),
    "reward": _killed(lambda trainer: trainer, "_calculate_rewards", "after"),
    "update": _killed(lambda trainer: trainer, "training_step", "after"),  # gradients are there, no step is done
    "log": _killed_logging,
    "model": _killed_writing(TreePOTrainer, "save_model", "model.safetensors"),
    "optimizer": _killed_writing(TreePOTrainer, "_save_optimizer_and_scheduler", "optimizer.pt"),
    "state": _killed_writing(TrainerState, "save_to_json", "trainer_state.json"),
    "full disk": _full_disk,
}
