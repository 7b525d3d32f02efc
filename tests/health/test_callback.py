"""Real trainings that are ill, and one that is well."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from tests.support.trainers import NUM_GENERATIONS, assert_same_run, build, make_config, trained
from treepo_trl import TreePOTrainer
from treepo_trl.health import HealthCallback


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("treepo_trl.health")]


def run(folder: Path, model: str, reward: Any = None, steps: int = 6, **changes: Any) -> Any:
    """A training on prompts of which each is new."""
    arguments = {} if reward is None else {"reward_funcs": reward}
    return trained(TreePOTrainer, model, make_config(folder, max_steps=steps, **changes), **arguments)


def nothing_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def none_reward(completions: list[Any], **_: Any) -> list[None]:
    return [None] * len(completions)


def even_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def test_a_reward_that_never_matches(tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, tiny_model_dir, nothing_reward, learning_rate=1e-3, per_device_train_batch_size=8 * NUM_GENERATIONS)
    (told,) = [line for line in warnings_of(caplog) if "cut off" not in line]  # nor is it told that nothing moves
    assert told.startswith(
        "Health, step 5: most prompts teach nothing: in 100% of the prompts all completions had the same reward, over "
        "5 logs, at a mean reward of 0. Usual: "
    )


def test_a_reward_function_that_scores_nothing(
    tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, tiny_model_dir, none_reward, steps=3)
    (line,) = warnings_of(caplog)
    assert line.startswith("Health, step 2: completions get no reward: no reward function scored any completion")


# A word in six ends a path, so that completions are short and the cap is far.
SHORT: dict[str, Any] = {
    "stop_pattern": r"w1\d",
    "max_completion_length": 48,
    "segment_length": 2,
    "learning_rate": 0.1,
}


def test_a_training_that_is_well_and_the_same_without_the_callback(
    tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    watched = run(tmp_path, tiny_model_dir, even_reward, steps=10, **SHORT)
    assert watched.state.global_step == 10
    assert warnings_of(caplog) == []
    alone = build(
        TreePOTrainer, tiny_model_dir, make_config(tmp_path, max_steps=10, **SHORT), reward_funcs=even_reward
    )
    alone.remove_callback(HealthCallback)
    assert not any(isinstance(each, HealthCallback) for each in alone.callback_handler.callbacks)
    alone.train()
    assert_same_run(watched, alone, parameter_tolerance=0.0)


def state_of(logs: list[dict[str, Any]], is_first: bool = True) -> TrainerState:
    return TrainerState(log_history=logs, is_world_process_zero=is_first)


IDLE = [{"learning_rate": 0.0, "step": step} for step in range(1, 6)]


def test_one_process_tells_and_a_resumed_training_does_not_tell_again(caplog: pytest.LogCaptureFixture) -> None:
    arguments: Any = None
    for state, is_told in [(state_of(IDLE), True), (state_of(IDLE, is_first=False), False)]:
        callback = HealthCallback()
        callback.on_train_begin(arguments, state_of([]), TrainerControl())
        callback.on_log(arguments, state, TrainerControl())
        assert bool(warnings_of(caplog)) is is_told
        caplog.clear()
    resumed = HealthCallback()
    resumed.on_train_begin(arguments, state_of(IDLE), TrainerControl())
    resumed.on_log(arguments, state_of([*IDLE, {"learning_rate": 0.0, "step": 6}]), TrainerControl())
    assert warnings_of(caplog) == []
