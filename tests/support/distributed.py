"""Trainings that run in two processes, and what each process writes about its own. See `processes.py`."""

import json
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import distributed

from tests.support.environments import GAME, GOES_ON, Counter, Forking, fresh
from tests.support.fsdp import start_fsdp2
from tests.support.policies import FakePolicy, SharedPolicy, use_fake_policy
from tests.support.tools import FIRST, LATER, ScriptedAgent, tool_config, tool_trainer
from tests.support.trainers import (
    RecordingTrainer,
    build,
    change,
    labelled,
    make_config,
    parameters_of,
    reward_by_kind,
    train,
)
from treepo_trl import SegmentTree, TreePOTrainer
from treepo_trl.checkpoints import newest_checkpoint
from treepo_trl.policy.gathered_adapter import gathered_adapter
from treepo_trl.update import packed_forward


# A long and a short prompt in turn: packing pays on the first process and not on the second.
PROMPTS = [" ".join(f"w{(i + j) % 60}" for j in range(1 if i % 2 else 40)) for i in range(8)]
# Four prompts per batch, two per process. First all of the second process's are replaced and one of the first's; then
# none; then one place of the first process needs all four rounds.
KINDS = "vcccvvv" + "vvvv" + "cvvvcccv"
# Turns that call nothing.
QUIET = ("It is 7.", "It is 12.", "No.", "I do not know that number.")
# What each process runs: a function of this file, with its arguments.
SCRIPT = """
import sys

from tests.support import distributed

getattr(distributed, sys.argv[1])(*sys.argv[2:])
"""


def make_trainer(
    model: str, folder: Path, cls: type = TreePOTrainer, lora: bool = False, ahead: int = 0, **changes: Any
) -> Any:
    """A trainer on `PROMPTS` in their order, whose rewards are scaled over the batch of all processes."""
    settings = {"max_completion_length": 9, "segment_length": 3, "scale_rewards": "batch", "log_trees": True}
    config = make_config(folder, **{**settings, "shuffle_dataset": False, **changes})
    config.rollout_ahead = ahead  # behind the check for servers
    return build(
        cls,
        model,
        config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )


def train_and_write(model: str, folder: str, changes: str) -> None:
    """Train with `make_trainer`; write the sizes of what is sampled, the logs and whether packing was worth it."""
    trainer = make_trainer(
        model, Path(folder), per_device_train_batch_size=4, ddp_backend="gloo", **json.loads(changes)
    )
    totals: list[list[Any]] = []
    sample = trainer.sampler.sample

    def recording_sample(prompts: Any, seed: str, **kwargs: Any) -> Any:
        trees = sample(prompts, seed, **kwargs)
        leaf_tokens, unique_tokens = sum(t.num_leaf_tokens for t in trees), sum(t.num_unique_tokens for t in trees)
        totals.append([leaf_tokens, unique_tokens, len(trees), seed])
        return trees

    worth: list[bool] = []
    is_worth_packing = packed_forward.is_worth_packing
    packed_forward.is_worth_packing = lambda packed: (worth.append(is_worth_packing(packed)), worth[-1])[1]
    trainer.sampler.sample = recording_sample
    trainer.train()
    advantages = list(trainer._logs["advantages"])
    _write(trainer, folder, {"totals": totals, "logged_advantages": advantages, "worth": worth})


def train_dynamically_and_write(model: str, folder: str) -> None:
    """Train on prompts of `KINDS` with dynamic sampling; write what is sampled, updated and logged."""
    trainer = train(
        Path(folder), model, KINDS, reward_and_log, shuffle_dataset=False, log_trees=True, ddp_backend="gloo"
    )
    result = {
        "sampled": trainer.sampled,
        "updated": [prompts for prompts, _ in trainer.updated],
        "largest": [advantages.abs().max().item() for _, advantages in trainer.updated],
        "extra": list(trainer._logs["extra"]["from"]),
        "prompts": list(trainer._logs["prompt"]),
        "rewards": list(trainer._logs["rewards"]["reward_and_log"]),
    }
    _write(trainer, folder, result)


def train_on_selected_prompts_and_write(model: str, folder: str) -> None:
    """Train with selected prompts, resume from the middle, and with rows that differ between the processes."""
    kinds = "zvzzzzvz"
    settings = {"prompt_selection": "pass_rate", "dynamic_sampling_rounds": 1, "max_steps": 8, "ddp_backend": "gloo"}

    def trained_to(name: str, start: str | None = None, **columns: Any) -> Any:
        config = make_config(Path(folder, name), save_strategy="steps", save_steps=4, **settings)
        data = Dataset.from_dict({**labelled(kinds).to_dict(), **columns})
        trainer = build(RecordingTrainer, model, config, train_dataset=data, reward_funcs=reward_by_kind)
        trainer.train(resume_from_checkpoint=start)
        return trainer

    whole = trained_to("whole")
    resumed = trained_to("resumed", f"{folder}/whole/checkpoint-4")
    try:
        trained_to("different", own=[f"/tmp/{os.environ['RANK']}"] * len(kinds))
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    keys = ("treepo_prompts_drawn", "treepo_pass_rates")
    states = [[run.state.stateful_callbacks[key] for key in keys] for run in (whole, resumed)]
    _write(whole, folder, {"sampled": [whole.sampled, resumed.sampled], "states": states, "error": error})


def train_with_tools_and_write(folder: str) -> None:
    """Train with tools that the model of the first process alone calls; write what the trees count."""
    rank = int(os.environ["RANK"])
    first = FIRST if rank == 0 else QUIET
    config = tool_config(Path(folder), log_trees=True, shuffle_dataset=False, ddp_backend="gloo")
    trainer = tool_trainer(RecordingTrainer, config, ScriptedAgent(rank, first, LATER))
    trainer.train()
    _write(trainer, folder, {"turns": [_turn_counts(trees) for trees in trainer.all_trees]})


def play_and_write(folder: str, changes: str) -> None:
    """Train in environments that the model of the first process alone calls; write what trees and they count."""
    rank = int(os.environ["RANK"])
    settings = {"log_trees": True, "shuffle_dataset": False, "ddp_backend": "gloo", **json.loads(changes)}
    environment = fresh(Counter if settings.get("environment_forking") == "replay" else Forking)
    agent = ScriptedAgent(rank, GAME if rank == 0 else QUIET, GOES_ON)
    trainer = tool_trainer(
        RecordingTrainer,
        tool_config(Path(folder), **{"max_completion_length": 500, **settings}),
        agent,
        tools=None,
        environment_factory=environment,
        reward_funcs=[],
    )
    trainer.train()
    counts = [_turn_counts(trees) for trees in trainer.all_trees]
    _write(trainer, folder, {"turns": counts, "resets": len(environment.resets)})


def _turn_counts(trees: list[SegmentTree]) -> dict[str, int]:
    """Counted node by node: calls that ran, calls on the paths of leaves, tokens of answers, leaves."""
    return {
        "executed": sum(node.num_calls for tree in trees for node in tree.nodes),
        "on_paths": sum(tree.nodes[i].num_calls for tree in trees for leaf in tree.leaves for i in tree.path(leaf)),
        "answer_tokens": sum(len(n.token_ids) for tree in trees for n in tree.nodes if not n.is_sampled),
        "leaves": sum(len(tree.leaves) for tree in trees),
    }


def resume_and_write(model: str, folder: str) -> None:
    """
    Train with a batch for each two of seven steps, four an epoch, then again from the checkpoint after the fifth.

    Writes both logs, how far the weights are from each other, and how often each training has sampled.
    """
    trainers = []
    for name, start in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-5")):
        changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "save_strategy": "steps"}
        changes |= {"max_steps": 7, "save_steps": 5, "shuffle_dataset": True}
        trainer = make_trainer(model, Path(folder, name), RecordingTrainer, ddp_backend="gloo", **changes)
        trainer.train(resume_from_checkpoint=start)
        trainers.append(trainer)
    whole, resumed = map(parameters_of, trainers)
    result = {
        "whole": trainers[0].state.log_history,
        "resumed": trainers[1].state.log_history,
        "difference": max((whole[name] - resumed[name]).abs().max().item() for name in whole),
        "sampled": [len(trainer.sampled) for trainer in trainers],
    }
    _write(trainers[1], folder, result)


def train_sharded_and_write(model: str, folder: str) -> None:
    """
    Train an adapter on equal trees, with whole weights, and with FSDP2 and gradient checkpointing.

    Writes both logs, and how far the adapters that the engine got are from each other, the trained ones last.
    """
    runs: list[list[dict[str, torch.Tensor]]] = []
    logs: list[list[dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("whole", "sharded"):
            adapters: list[dict[str, torch.Tensor]] = []

            def synchronize(trainer: Any, adapters: list[dict[str, torch.Tensor]] = adapters) -> None:
                policy = trainer.accelerator.unwrap_model(trainer.model)
                adapters.append(gathered_adapter(policy, trainer.accelerator))

            use_fake_policy(monkeypatch, partial(FakePolicy, synchronize=synchronize))
            if name == "sharded":
                start_fsdp2(monkeypatch)
            changes: dict[str, Any] = {"tree_packing": "sdpa", "ddp_backend": "gloo"}
            if name == "sharded":  # which changes no number either
                changes |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
            trainer = make_trainer(model, Path(folder, name), lora=True, **changes)
            trainer.train()
            synchronize(trainer)
            runs.append(adapters)
            logs.append(trainer.state.log_history)
    largest = [
        max((whole[key] - sharded[key]).abs().max().item() for key in whole)
        for whole, sharded in zip(*runs, strict=True)
    ]
    moved = max((runs[0][-1][key] - runs[0][0][key]).abs().max().item() for key in runs[0][0])
    types = sorted({type(parameter).__name__ for parameter in trainer.model.parameters()})
    _write(trainer, folder, {"difference": largest, "moved": moved, "types": types, "whole": logs[0]})


def train_ahead_and_write(model: str, folder: str) -> None:
    """
    Train without a batch ahead and with one, where the first process samples for both.

    Writes both logs, the versions that were sampled from, the threads that sampled and how far the weights are apart.
    """
    trainers, versions, threads = [], [], []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for ahead in (0, 1):
            steps: list[int] = []
            synchronize = partial(lambda steps, trainer: steps.append(trainer.state.global_step), steps)
            use_fake_policy(monkeypatch, partial(SharedPolicy, synchronize=synchronize))
            changes = {"per_device_train_batch_size": 4, "max_steps": 4, "branch_schedule": "early"}
            changes |= {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
            to = Path(folder, str(ahead))
            trainer = make_trainer(model, to, RecordingTrainer, ahead=ahead, ddp_backend="gloo", **changes)
            names: list[str] = []
            sample = trainer.sampler.sample

            def named(*args: Any, sample: Any = sample, names: list[str] = names, **kwargs: Any) -> Any:
                names.append(threading.current_thread().name)
                return sample(*args, **kwargs)

            trainer.sampler.sample = named
            trainer.train()
            trainers.append(trainer)
            versions.append(steps)
            threads.append(names)
    off, on = map(parameters_of, trainers)
    result = {
        "off": trainers[0].state.log_history,
        "versions": versions,
        "threads": threads,
        "difference": max((off[name] - on[name]).abs().max().item() for name in off),
        "moved": change(trainers[1]),
        "got": [[prompts for prompts, _ in trainer.updated] for trainer in trainers],
    }
    _write(trainers[1], folder, result)


def lose_what_is_ahead_and_write(model: str, folder: str) -> None:
    """
    Train until the thread of the first process fails, go on from the checkpoint, then resume one of two next batches.

    Writes the error, the checkpoint that it left, whether each resume had a next batch, and the steps of all samplings
    since.
    """
    steps: list[str] = []
    errors: list[str] = []

    def trainer_to(max_steps: int, is_failing: bool = False) -> Any:
        changes = {"per_device_train_batch_size": 4, "max_steps": max_steps, "eval_strategy": "no"}
        changes |= {"save_strategy": "steps", "save_steps": 1, "log_trees": False}
        trainer = make_trainer(model, Path(folder), RecordingTrainer, ahead=1, ddp_backend="gloo", **changes)
        sample = trainer.sampler.sample

        def told(prompts: Any, seed: str, **kwargs: Any) -> Any:
            if is_failing and threading.current_thread() is not threading.main_thread():
                raise OSError("the server has gone")
            if not is_failing:
                steps.append(seed.split("/")[1])
            return sample(prompts, seed, **kwargs)

        trainer.sampler.sample = told
        return trainer

    def is_pending(trainer: Any, checkpoint: str) -> bool:
        trainer._resume_point.restore(checkpoint)
        return trainer._source.pending is not None

    with pytest.MonkeyPatch.context() as monkeypatch:
        use_fake_policy(monkeypatch, SharedPolicy)
        try:
            trainer_to(4, is_failing=True).train()
        except (OSError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        saved = [newest_checkpoint(folder), [path.name for path in Path(folder).glob("*/next_batch_*")]]
        distributed.barrier()
        trainer_to(4).train(resume_from_checkpoint=True)
        checkpoint = Path(folder, "checkpoint-2")
        file = checkpoint / "next_batch_1.json"
        damaged, content = sorted(path.name for path in checkpoint.glob("next_batch_*")), file.read_text()
        distributed.barrier()
        file.write_text(content[: len(content) // 2])
        distributed.barrier()
        pending = [is_pending(trainer_to(4), str(checkpoint))]
        trainer = trainer_to(4)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        distributed.barrier()
        file.write_text(content)
        distributed.barrier()
        pending.append(is_pending(trainer_to(4), str(checkpoint)))
    result = {"errors": errors, "saved": saved, "damaged": damaged, "is_pending": pending, "seeds": steps}
    _write(trainer, folder, result)


def reward_and_log(prompts: list[str], completion_ids: Any, kind: list[str], log_extra: Any, **_: Any) -> list:
    log_extra("from", [f"{prompt}/{i % 4}" for i, prompt in enumerate(prompts)])
    return reward_by_kind(completion_ids, kind)


def _write(trainer: Any, folder: str, result: dict[str, Any]) -> None:
    assert trainer.accelerator.num_processes == 2
    rank = trainer.accelerator.process_index
    torch.save(parameters_of(trainer), f"{folder}/rank{rank}.pt")
    Path(folder, f"rank{rank}.json").write_text(json.dumps({**result, "logs": trainer.state.log_history}))
    distributed.destroy_process_group()
