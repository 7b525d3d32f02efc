"""Subclasses of `TreePOTrainer` that override what a subclass of GRPOTrainer may override."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.trainers import RecordingTrainer, build, labelled, logs_of, make_config, trained


def zero_or_two(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [2.0 * (i % 2) for i in range(len(completion_ids))]


class ShapingTrainer(RecordingTrainer):
    """Squares what the reward functions give."""

    calls = 0

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return super()._calculate_rewards(*args, **kwargs) ** 2 + 1


@pytest.mark.parametrize("estimator", ["grpo", "treepo"])
@pytest.mark.parametrize("rounds", [0, 2])
def test_shaped_rewards_are_shaped_once(tmp_path: Path, tiny_model_dir: str, estimator: str, rounds: int) -> None:
    config = make_config(
        tmp_path,
        max_steps=1,
        dynamic_sampling_rounds=rounds,
        advantage_estimator=estimator,
        branching_factor=1,  # one group: all estimators alike
        scale_rewards="none",
        log_trees=True,
    )
    trainer = trained(ShapingTrainer, tiny_model_dir, config, reward_funcs=zero_or_two)
    assert trainer.calls == 1
    assert logs_of(trainer, "reward") == [3.0]  # of 1 and 5
    (_, advantages) = trainer.updated[0]
    assert {abs(value) for value in advantages.flatten().tolist() if value} == {2.0}


class RewardingTrainer(RecordingTrainer):
    """Gives rewards of its own, by the kind of the prompt: reward functions are not called."""

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        assert len(inputs) == len(prompts) == len(completions) == len(completion_ids_list)
        return torch.tensor([[float(i % 2) if row["kind"] == "v" else 0.0] for i, row in enumerate(inputs)])


@pytest.mark.parametrize("rounds", [0, 1])
def test_rewards_may_be_replaced(tmp_path: Path, tiny_model_dir: str, rounds: int) -> None:
    """Dynamic sampling replaces prompts by what the subclass says they are worth."""
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=rounds, shuffle_dataset=False)
    trainer = trained(
        RewardingTrainer, tiny_model_dir, config, train_dataset=labelled("cvvvvvvv"), reward_funcs=zero_or_two
    )
    ((prompts, advantages),) = trainer.updated
    assert set(prompts) == ({"w2", "w1"} if rounds else {"w0", "w1"})
    assert logs_of(trainer, "reward") == [0.5 if rounds else 0.25]
    for prompt, row in zip(prompts, advantages, strict=True):
        assert row.any() == (prompt != "w0")


class ScalingTrainer(RecordingTrainer):
    """Multiplies the advantages of what is scored."""

    factor = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scored: list[int] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.scored.append(len(output["completion_ids"]))
        return {**output, "advantages": self.factor * output["advantages"]}


@pytest.mark.parametrize("estimator", ["grpo", "treepo"])
@pytest.mark.parametrize("rounds", [0, 2])
def test_what_is_scored_may_be_changed(tmp_path: Path, tiny_model_dir: str, estimator: str, rounds: int) -> None:
    """The loss gets what the subclass returns, once per batch whatever the number of rounds."""
    runs = []
    for factor in (1.0, 3.0):
        config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=rounds, advantage_estimator=estimator)
        runs.append(build(ScalingTrainer, tiny_model_dir, config))
        runs[-1].factor = factor
        runs[-1].train()
        assert runs[-1].scored == [8]
    ((prompts, plain),), ((same_prompts, scaled),) = runs[0].updated, runs[1].updated
    assert prompts == same_prompts
    assert plain.any()
    torch.testing.assert_close(scaled, 3 * plain)
