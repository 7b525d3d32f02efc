"""Trainings with `prompt_selection`: what is sampled and logged, and with what it does not go."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.support.environments import Counter
from tests.support.trainers import (
    RecordingTrainer,
    assert_same_run,
    build,
    labelled,
    logs_of,
    make_config,
    reward_by_kind,
    train,
    trained,
)
from treepo_trl import TreePOTrainer
from treepo_trl.batch.prompt_selection import LEAST_CHANCE


SELECTED: dict[str, Any] = {"prompt_selection": "pass_rate", "dynamic_sampling_rounds": 0}


def test_the_first_pass_is_that_of_a_training_without(tmp_path: Path, tiny_model_dir: str) -> None:
    runs = []
    for selection in ("off", "pass_rate"):
        config = make_config(tmp_path / selection, max_steps=3, prompt_selection=selection)
        runs.append(trained(RecordingTrainer, tiny_model_dir, config))
    assert runs[0].sampled == runs[1].sampled
    assert_same_run(*runs)
    assert logs_of(runs[1], "prompt_selection/frac_passed_over") == [0, 0, 0]
    keys = [{key for log in run.state.log_history for key in log} for run in runs]
    assert keys[1] - keys[0] == {"prompt_selection/frac_passed_over", "prompt_selection/frac_known"}


def test_later_passes_pass_over_what_was_always_wrong(tmp_path: Path, tiny_model_dir: str) -> None:
    """Batches of two, from a pass of ten: from the second on the eight zeros come less and less often."""
    trainer = train(tmp_path, tiny_model_dir, "zvzzzzvzzz", max_steps=30, learning_rate=0.0, **SELECTED)
    drawn = [prompt for prompts in trainer.sampled for prompt in prompts]
    assert len(drawn) == 60
    assert sorted(drawn[:10]) == [f"w{i}" for i in range(10)]
    later = drawn[10:]
    share = sum(prompt in ("w1", "w6") for prompt in later) / len(later)
    # Four leaves: after one visit a zero is taken with a third, after two with a quarter, against 1.
    assert 0.35 < share < 0.65
    assert {f"w{i}" for i in range(10)} == set(later)  # none is left out
    number, row = trainer.state.stateful_callbacks["treepo_prompts_drawn"]
    passed_over = 10 * number + row - 60
    fractions = logs_of(trainer, "prompt_selection/frac_passed_over")
    assert sum(2 * each / (1 - each) for each in fractions) == pytest.approx(passed_over)
    assert passed_over > 60 * LEAST_CHANCE
    assert logs_of(trainer, "prompt_selection/frac_known") == [0] * 5 + [1] * 25


def test_with_dynamic_sampling_replacements_are_selected_too(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = train(tmp_path, tiny_model_dir, "zvzzzzvzzz", max_steps=12, prompt_selection="pass_rate")
    for prompts, advantages in trainer.updated:
        assert set(prompts) <= {"w1", "w6"}
        assert advantages.abs().max() > 0
    sampled = sum(map(len, trainer.sampled))
    without = train(tmp_path / "without", tiny_model_dir, "zvzzzzvzzz", max_steps=12)
    assert sampled < 0.8 * sum(map(len, without.sampled))
    assert logs_of(trainer, "dynamic_sampling/frac_without_signal") == [0] * 12


def test_pass_rates_end_with_the_setting(tmp_path: Path, tiny_model_dir: str) -> None:
    """A training that goes on without it keeps none in its checkpoints, with dynamic sampling and without."""

    def run(name: str, start: str | None, steps: int, **changes: Any) -> Any:
        config = make_config(tmp_path / name, max_steps=steps, save_strategy="steps", save_steps=1, **changes)
        data = labelled("zvzzzzvz")
        trainer = build(TreePOTrainer, tiny_model_dir, config, train_dataset=data, reward_funcs=reward_by_kind)
        trainer.train(resume_from_checkpoint=start and str(tmp_path / start))
        return trainer.state.stateful_callbacks

    assert len(run("selected", None, 2, **SELECTED)["treepo_pass_rates"]) == 4
    for name, rounds in (("dynamic", 1), ("plain", 0)):
        assert "treepo_pass_rates" not in run(name, "selected/checkpoint-2", 3, dynamic_sampling_rounds=rounds)


def test_what_it_does_not_go_with(tmp_path: Path, tiny_model_dir: str) -> None:
    class Curriculum(TreePOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return super()._get_train_sampler(dataset)

    with pytest.raises(ValueError, match=r"`prompt_selection='pass_rate'` draws .* `Curriculum` overrides"):
        build(Curriculum, tiny_model_dir, make_config(tmp_path, **SELECTED))
    environments = {"environment_factory": Counter, "reward_funcs": reward_by_kind}
    for data in (None, Dataset.from_dict({"seed": list(range(8))})):
        with pytest.raises(ValueError, match=r"`prompt_selection='pass_rate'` knows a prompt by its row"):
            build(TreePOTrainer, tiny_model_dir, make_config(tmp_path, **SELECTED), train_dataset=data, **environments)
