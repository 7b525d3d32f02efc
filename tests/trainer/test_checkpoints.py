"""Checkpoints and saved models."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from tests.support.trainers import (
    RecordingTrainer,
    assert_same_parameters,
    build,
    labelled,
    logs_of,
    make_config,
    parameters_of,
    reward_by_kind,
    train,
)
from treepo_trl import TreePOTrainer


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """What this package keeps in a checkpoint. Its names are those of older checkpoints too."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]


@pytest.mark.parametrize("kind", ["full", "lora", "two steps per generation", "spread"])
def test_resume_continues_the_run(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    """Four steps in one go, and two steps with a fresh trainer from the checkpoint after the second."""

    def make(folder: str) -> Any:
        peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if kind == "lora" else None
        changes: dict[str, Any] = {}
        if "two" in kind:
            changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
        if kind == "spread":  # branches over the last batch's mean length
            changes = {"branch_schedule": "spread", "max_completion_length": 40, "segment_length": 3}
        config = make_config(
            tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch",
            learning_rate=1e-2, lr_scheduler_type="linear", **changes,
        )  # fmt: skip
        return build(TreePOTrainer, tiny_model_dir, config, peft_config=peft)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same_parameters(parameters_of(whole), parameters_of(resumed), 1e-6)
    assert logs_of(whole, "reward") == pytest.approx(logs_of(resumed, "reward"), abs=1e-6)
    assert "treepo_expected_length" in saved_state(tmp_path / "whole/checkpoint-2")
    card = (tmp_path / "whole/README.md").read_text()
    assert "TreePO" in card
    assert "2508.17445" in card


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_resumed_training_draws_on(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    kinds = "cvvcvcvvccv"

    def make(name: str) -> Any:
        dataset = labelled(kinds) if kind == "map" else labelled(kinds).to_iterable_dataset()
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


def test_a_training_resumed_inside_a_batch_samples_it_again(tmp_path: Path, tiny_model_dir: str) -> None:
    def make(name: str) -> Any:
        changes = {"num_iterations": 2, "dynamic_sampling_rounds": 4, "save_strategy": "steps", "save_steps": 1}
        config = make_config(tmp_path / name, max_steps=4, **changes)
        arguments = {"train_dataset": labelled("cvvcvcvvccvvvv"), "reward_funcs": reward_by_kind}
        return build(RecordingTrainer, tiny_model_dir, config, **arguments)

    whole = make("whole")
    whole.train()
    starts = [0, next(i for i in range(1, len(whole.sampled)) if len(whole.sampled[i]) == 2)]
    for checkpoint, start in ((1, starts[0]), (2, starts[1]), (3, starts[1])):
        resumed = make(f"resumed{checkpoint}")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{checkpoint}"))
        rest = whole.sampled[start:]
        assert resumed.sampled[: len(rest)] == rest[: len(resumed.sampled)], checkpoint


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


def test_a_checkpoint_before_the_optimizer_step_does_not_lose_the_batch(tmp_path: Path, tiny_model_dir: str) -> None:
    """As transformers writes one when the process is told to end."""

    class SaveBeforeStep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                trainer._save_checkpoint(trainer.model, trial=None)

    config = make_config(tmp_path, max_steps=2, dynamic_sampling_rounds=1)
    trainer = build(RecordingTrainer, tiny_model_dir, config, callbacks=[SaveBeforeStep()])
    trainer.train()
    resumed = build(RecordingTrainer, tiny_model_dir, config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(trainer.sampled) == 2
    assert resumed.sampled == trainer.sampled[1:]


def test_training_twice_starts_the_stream_again(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = train(tmp_path, tiny_model_dir, "vvvvvvvvvvvv", max_steps=2, learning_rate=0.0)
    first = list(trainer.sampled)
    trainer.train()
    assert trainer.sampled[len(first) :] == first
