"""Checkpoints and saved models."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.support.distributed import SCRIPT
from tests.support.models import make_model
from tests.support.processes import run_in_two_processes
from tests.support.trainers import (
    RecordingTrainer,
    assert_same_parameters,
    build,
    change,
    labelled,
    logs_of,
    make_config,
    parameters_of,
    parity_reward,
    plain_prompts,
    reward_by_kind,
    train,
)
from treepo_trl import TreePOTrainer


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """What this package keeps in a checkpoint. Its names are those of older checkpoints too."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]


# Two optimizer steps for each pass over a generation batch, and two passes.
INSIDE: dict[str, Any] = {
    "num_iterations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
}
# Epochs of four micro-batches in steps of three: the second step is short, and batches begin in the middle of steps.
SHORT: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "steps_per_generation": 2,
    "num_prompts": 5,
}
DYNAMIC: dict[str, Any] = {"dynamic_sampling_rounds": 4, "kinds": "cvvcvcvvccvvvv"}
SELECTED: dict[str, Any] = {"prompt_selection": "pass_rate", "kinds": "zzvz"}
DROPOUT: dict[str, Any] = {"dropout": 0.1}


class SaveBeforeStep(TrainerCallback):
    """As transformers writes a checkpoint when the process is told to end."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


def without_times(log: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in log.items() if not re.search("time|second|flos|train_", name)}


@pytest.mark.parametrize(
    ("step", "before", "settings"),
    [
        # Spread over the mean length of the last batch.
        pytest.param(2, False, {**DROPOUT, "branch_schedule": "spread"}, id="end of a batch"),
        pytest.param(1, False, {**INSIDE, **DROPOUT}, id="first pass"),
        pytest.param(3, False, {**INSIDE, **DYNAMIC}, id="second pass"),
        pytest.param(3, False, SELECTED, id="second pass, selected prompts"),
        pytest.param(3, False, {**INSIDE, **DYNAMIC, **SELECTED}, id="selected and dynamic"),
        pytest.param(3, False, SHORT, id="second epoch"),
        pytest.param(1, True, {**INSIDE, **DROPOUT}, id="before a step, inside of a batch"),
        pytest.param(1, True, {**DYNAMIC, **DROPOUT}, id="before a step, new batch"),
        pytest.param(3, True, {**SELECTED, **DROPOUT}, id="before a step, selected prompts"),
        pytest.param(2, True, {**SHORT, **DROPOUT}, id="before a step, new epoch"),
    ],
)
def test_a_resumed_training_is_the_same_curve(
    tmp_path: Path, tiny_model_dir: str, step: int, before: bool, settings: dict[str, Any]
) -> None:
    """Number for number: all that is logged but times, and the weights. `before`: saved before an optimizer step."""
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", **settings}
    kinds, dropout = settings.pop("kinds", None), settings.pop("dropout", None)
    plain = plain_prompts(settings.pop("num_prompts", 16))
    arguments = {
        "train_dataset": labelled(kinds) if kinds else plain,
        "reward_funcs": reward_by_kind if kinds else parity_reward,
        "peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout) if dropout else None,
    }

    def make(name: str, **changes: Any) -> Any:
        config = make_config(tmp_path / name, max_steps=5, **settings, **changes)
        return build(RecordingTrainer, tiny_model_dir, config, **arguments)

    whole = make("whole", save_strategy="no" if before else "steps", save_steps=1)
    if before:
        whole.add_callback(SaveBeforeStep(whole, step))
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
    for log, same in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        assert without_times(log) == without_times(same)
    assert len(logs_of(whole, "loss")) == 5
    assert change(whole) > 1e-3
    assert_same_parameters(parameters_of(whole), parameters_of(resumed), 0.0)
    # The batch that is under way is not sampled again, only that of a step which is done once more.
    assert resumed.told == whole.told[len(whole.told) - len(resumed.told) :]


def test_two_processes_resume_the_same_curve(tmp_path: Path, tiny_model_dir: str) -> None:
    ranks = run_in_two_processes(SCRIPT, tmp_path, "resume_and_write", tiny_model_dir, str(tmp_path))
    names = [path.name for path in (tmp_path / "whole/checkpoint-5").glob("generation_batch_*")]
    assert sorted(names) == ["generation_batch_0.pt", "generation_batch_1.pt"]
    for rank in ranks:
        for log, same in zip(rank["whole"][5:], rank["resumed"][5:], strict=True):  # those before are of one rank
            assert without_times(log) == without_times(same)
        assert rank["difference"] == 0.0
        assert rank["sampled"] == [4, 1]


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str) -> Path:
    """A checkpoint that was written in the middle of a generation batch."""
    folder = tmp_path_factory.mktemp("inside")
    config = make_config(folder, max_steps=1, save_strategy="steps", save_steps=1, **INSIDE)
    build(RecordingTrainer, tiny_model_dir, config).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    "kind",
    ["another setting", "another temperature", "no rows", "unreadable rows", "an older checkpoint", "save_only_model"],
)
def test_a_batch_that_cannot_go_on_is_sampled_anew_with_a_warning(
    tmp_path: Path, tiny_model_dir: str, inside: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    checkpoint = shutil.copytree(inside, tmp_path / "checkpoint-1")
    rows, state = checkpoint / "generation_batch_0.pt", checkpoint / "trainer_state.json"
    if kind == "unreadable rows":
        torch.save(Path("an object, not a tensor"), rows)
    elif not kind.startswith("another"):
        rows.unlink()
    if kind == "an older checkpoint":
        content = json.loads(state.read_text())
        assert content["stateful_callbacks"].pop("treepo_batch")["micro_steps"] == 2
        state.write_text(json.dumps(content))
    if kind == "save_only_model":
        (checkpoint / "optimizer.pt").unlink()
    settings = {**INSIDE, "num_iterations": 3 if kind == "another setting" else 2}
    if kind == "another temperature":
        settings["temperature"] = 0.5
    resumed = build(RecordingTrainer, tiny_model_dir, make_config(tmp_path, max_steps=2, **settings))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    (message,) = [record.message for record in caplog.records if "middle of a generation batch" in record.message]
    assert {
        "another setting": "`num_iterations` was 2 and is 3",
        "another temperature": "and is 0.5",
        "no rows": "No such file",
        "save_only_model": "No such file",
        "unreadable rows": "cannot be read",
        "an older checkpoint": "does not hold its rows",
    }[kind] in message
    assert ("holds no state of the optimizer" in caplog.text) is (kind == "save_only_model")
    assert len(resumed.sampled) == 1
    assert resumed.state.global_step == 2


def test_what_a_checkpoint_does_not_hold_is_said(
    tmp_path: Path, tiny_model_dir: str, inside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights of the reference model are in none, and transformers says nothing of files that are missing."""

    def said(missing: str | None, **changes: Any) -> str:
        checkpoint = shutil.copytree(inside, tmp_path / "checkpoint-1", dirs_exist_ok=True)
        if missing is not None:
            (checkpoint / missing).unlink()
        caplog.clear()
        trainer = build(RecordingTrainer, tiny_model_dir, make_config(tmp_path, max_steps=1, **INSIDE, **changes))
        trainer._resume_point.restore(str(checkpoint))
        return caplog.text

    assert said(None) == ""
    assert "no state of the optimizer (" in said("optimizer.pt")
    assert "no state of the learning rate schedule (" in said("scheduler.pt")
    assert "no state of the random numbers (" in said("rng_state.pth")
    assert "`sync_ref_model=True`" in said(None, beta=0.1, sync_ref_model=True)


def test_a_checkpoint_that_was_set_aside_is_resumed(tmp_path: Path, tiny_model_dir: str, inside: Path) -> None:
    shutil.copytree(inside, tmp_path / "before-checkpoint-1")
    (tmp_path / "checkpoint-1").mkdir()
    resumed = build(RecordingTrainer, tiny_model_dir, make_config(tmp_path, max_steps=2, **INSIDE))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert not resumed.sampled
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]


def test_a_resumed_training_draws_on_from_an_iterable_dataset(tmp_path: Path, tiny_model_dir: str) -> None:
    kinds = "cvvcvcvvccv"

    def make(name: str) -> Any:
        dataset = labelled(kinds).to_iterable_dataset()
        changes = {"max_steps": 4, "dynamic_sampling_rounds": 4, "save_strategy": "steps", "save_steps": 2}
        arguments = {"train_dataset": dataset, "reward_funcs": reward_by_kind}
        return build(RecordingTrainer, tiny_model_dir, make_config(tmp_path / name, **changes), **arguments)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert len(resumed.sampled) < len(whole.sampled)
    number, row = saved_state(tmp_path / "whole/checkpoint-2")["treepo_prompts_drawn"]
    drawn = whole.sampled[: -len(resumed.sampled)]
    assert number * len(kinds) + row == sum(len(prompts) for prompts in drawn)
    assert whole.sampled[-len(resumed.sampled) :] == resumed.sampled
    assert_same_parameters(parameters_of(whole), parameters_of(resumed), 1e-6)


def test_a_checkpoint_without_position_is_warned_about(
    tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, rounds: int, steps: int, start: str | None, **changes: Any) -> tuple[Any, bool]:
        """Train in a folder up to `steps`; whether it is said that prompts are drawn from the start."""
        changes = {"dynamic_sampling_rounds": rounds, "save_strategy": "steps", "save_steps": 1, **changes}
        trainer = build(RecordingTrainer, tiny_model_dir, make_config(tmp_path / name, max_steps=steps, **changes))
        caplog.clear()
        trainer.train(resume_from_checkpoint=start and str(tmp_path / start))
        return trainer, "does not say which prompts" in caplog.text

    plain, _ = run("plain", 0, 1, None)
    resumed, is_warned = run("resumed", 2, 2, "plain/checkpoint-1")
    assert is_warned
    assert resumed.sampled[0] == plain.sampled[0]
    skipping, is_warned = run("skipping", 2, 2, "plain/checkpoint-1", ignore_data_skip=True)
    assert not is_warned
    assert skipping.sampled[0] == plain.sampled[0]
    # On, off, on: the position of the first part says nothing about what the second has drawn.
    run("resumed", 0, 3, "resumed/checkpoint-2")
    assert run("resumed", 2, 4, "resumed/checkpoint-3")[1]


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_training_twice_starts_again(tmp_path: Path, tiny_model_dir: str, num_iterations: int) -> None:
    """With two iterations the first training ends in the middle of a batch."""
    trainer = train(
        tmp_path, tiny_model_dir, "vvvvvvvvvvvv", max_steps=3, learning_rate=0.0, num_iterations=num_iterations
    )
    first, seeds = list(trainer.sampled), [told["seed"] for told in trainer.told]
    trainer.train()
    assert trainer.sampled[len(first) :] == first
    assert [told["seed"] for told in trainer.told][len(seeds) :] == seeds


def test_a_resume_after_an_error_is_that_of_a_new_trainer(tmp_path: Path) -> None:
    """The third batch's rewards are asked for in the middle of an accumulation window; they fail once."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "steps_per_generation": 4}
    settings |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "use_adaptive_entropy": True}

    def run(name: str, fails: bool) -> Any:
        calls = 0

        def reward(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
            nonlocal calls
            calls += 1
            is_failing = fails and calls == 3
            log_metric("seen", 100.0 if is_failing else 1.0)
            log_extra("seen", [str(is_failing)] * len(completion_ids))
            if is_failing:
                raise OSError("once")
            return parity_reward(completion_ids)

        trainer = build(TreePOTrainer, make_model(), make_config(tmp_path / name, **settings), reward_funcs=reward)
        if fails:
            with pytest.raises(OSError, match="once"):
                trainer.train()
        trainer.train(resume_from_checkpoint=fails)
        return trainer

    whole, again = run("whole", fails=False), run("again", fails=True)
    assert list(map(without_times, again.state.log_history)) == list(map(without_times, whole.state.log_history))
    assert_same_parameters(parameters_of(again), parameters_of(whole), tolerance=0.0)
    assert {*map(len, again._logs["extra"].values())} == {len(again._logs["completion"])}
