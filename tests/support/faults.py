"""Trainings in processes of their own, and what goes wrong in them."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerState

from tests.support.trainers import build, labelled, make_config, reward_by_kind
from treepo_trl import TreePOTrainer
from treepo_trl.policy import temporary_folder
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration
from treepo_trl.policy.temporary_folder import TemporaryFolder
from treepo_trl.scoring import outcome


STEPS = 4
LAST_SAVED = 2
"""The last checkpoint that is whole when a fault comes: all faults are in the third step or its checkpoint."""

# Imports what trainings need once and forks: a process starts in a fraction of a second, with no thread of the tests'.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def run_in_process(job: Callable[..., None], folder: Path, *arguments: Any, timeout: float = 300) -> int | None:
    """
    Exit status of a job in a process of its own; minus the signal that has ended it.

    What it prints is in `output.txt` of its folder, without that of an earlier job.
    """
    process = _processes.Process(target=_run, args=(job, folder, *arguments), daemon=True)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{job.__name__} did not end in {timeout} s:\n{output_of(folder)}")
    return process.exitcode


def _run(job: Callable[..., None], folder: Path, *arguments: Any) -> None:
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    job(folder, *arguments)


def output_of(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def make_trainer(folder: Path, model: str, peft_config: LoraConfig | None = None, **changes: Any) -> TreePOTrainer:
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
    data = {"train_dataset": labelled("cvvcvcvvccvvcv"), "reward_funcs": reward_by_kind, "peft_config": peft_config}
    return build(TreePOTrainer, model, make_config(folder, **{**settings, **changes}), **data)


def training(folder: Path, model: str, fault: str | None = None, resume: bool = False) -> None:
    """Train in a folder."""
    trainer = make_trainer(folder, model)
    if fault is not None:
        FAULTS[fault](trainer)
    trainer.train(resume_from_checkpoint=resume)
    keep_log(trainer)


def syncing_training(folder: Path, model: str, fault: str | None = None, resume: bool = False) -> None:
    """Train an adapter in a folder; an engine that computes nothing gets it before each sampling."""
    temporary_folder.SHARED_MEMORY = folder / "shared memory"
    temporary_folder.SHARED_MEMORY.mkdir(exist_ok=True)
    trainer = make_trainer(folder, model, LoraConfig(r=4, target_modules="all-linear"))
    generation: Any = object.__new__(AdapterVLLMGeneration)
    generation.model, generation.share_base_weights, generation.enable_sleep_mode = trainer.model, False, False
    generation.accelerator = trainer.accelerator
    generation._dist, generation._adapter_folder = (
        trainer._dist,
        TemporaryFolder("adapter", temporary_folder.SHARED_MEMORY),
    )
    engine = SimpleNamespace(add_lora=lambda request: None)
    generation.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: True)
    vllm_names: Any = SimpleNamespace(LoRARequest=lambda *args, **options: args)
    sys.modules["vllm.lora.request"] = vllm_names
    for step in range(STEPS):
        around(trainer, trainer.policy_engine, "ready", step, before=lambda *_: generation.sync_weights())
    if fault == "sync":
        around(trainer, engine, "add_lora", LAST_SAVED, before=die)
    trainer.train(resume_from_checkpoint=resume)
    keep_log(trainer)


def keep_log(trainer: TreePOTrainer) -> None:
    """Write what [`assert_same_training`] reads of a training that is done."""
    Path(str(trainer.args.output_dir), "logged.json").write_text(json.dumps(trainer.state.log_history))


def assert_same_training(folder: Path, other: Path) -> None:
    """Both are done, and have logged, learned and written the same."""
    assert _curve(folder) == [pytest.approx(log, abs=1e-5) for log in _curve(other)]
    torch.testing.assert_close(_weights(folder), _weights(other), rtol=0, atol=1e-6)
    assert _tree_log(folder) == _tree_log(other)


def _curve(folder: Path) -> list[dict[str, float]]:
    """What each step of a training has logged, without how long it took."""
    logs = json.loads((folder / "logged.json").read_text())[:STEPS]
    assert [log["step"] for log in logs] == list(range(1, STEPS + 1))
    return [{key: value for key, value in log.items() if "time" not in key and "seconds" not in key} for log in logs]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / f"checkpoint-{STEPS}").glob("*.safetensors")
    return load_file(file)


def _tree_log(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (folder / "trees").iterdir()}


# Faults, each in the third step or in its checkpoint

Plan = Callable[[Any], None]
"""Prepares a trainer for what goes wrong in its training."""


def around(trainer: Any, owner: Any, name: str, step: int, before: Any = None, after: Any = None) -> None:
    """At a number of finished steps, call `before` ahead of a method of `owner` and `after` behind it."""
    method = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        is_time = trainer.state.global_step == step
        if is_time and before is not None:
            before(*args)
        result = method(*args, **kwargs)
        if is_time and after is not None:
            after(*args)
        return result

    setattr(owner, name, faulty)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_with_half_of(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    die()


def _killed(part: Callable[[Any], Any], name: str, when: str) -> Plan:
    """Kill the process before or after a method in the third step."""
    return lambda trainer: around(trainer, part(trainer), name, LAST_SAVED, **{when: die})


def _killed_logging(trainer: Any) -> None:
    """Kill the process when half of the third step's tree log is there."""
    path = Path(trainer.args.output_dir) / f"trees/trees_{LAST_SAVED:06d}.jsonl"
    around(trainer, outcome, "write_trees", LAST_SAVED, after=lambda *_: _die_with_half_of(path))


def _killed_saving(owner: Any, name: str, file: str) -> Plan:
    """Kill the process when half of a file of the third checkpoint is there."""

    def plan(trainer: Any) -> None:
        path = Path(trainer.args.output_dir) / f"checkpoint-{LAST_SAVED + 1}" / file
        around(trainer, owner, name, LAST_SAVED + 1, after=lambda *_: _die_with_half_of(path))

    return plan


def _full_disk(trainer: Any) -> None:
    """Let no file of the third checkpoint grow beyond 20 kB."""
    limit = 20_000, resource.RLIM_INFINITY
    fill = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, limit)  # noqa: E731
    around(trainer, trainer, "_save_checkpoint", LAST_SAVED + 1, before=fill)


KILLED: dict[str, Plan] = {
    "sampling": _killed(lambda trainer: trainer.policy_engine.engine, "collect", "before"),
    "reward": _killed(lambda trainer: trainer, "_calculate_rewards", "before"),
    "log": _killed_logging,
    "update": _killed(lambda trainer: trainer, "training_step", "after"),  # gradients are there, no step is done
    "save, model": _killed_saving(TreePOTrainer, "save_model", "model.safetensors"),
    "save, optimizer": _killed_saving(TreePOTrainer, "_save_optimizer_and_scheduler", "optimizer.pt"),
    "save, state": _killed_saving(TrainerState, "save_to_json", "trainer_state.json"),
}
FAULTS: dict[str, Plan] = {**KILLED, "full disk": _full_disk}
