"""pass@k and maj@k beside the means of a training's evaluation."""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.support.trainers import SpyTrainer, build, make_config
from treepo_trl.scoring.evaluation import answers_of, group_metrics


def test_hand_arithmetic_over_two_prompts() -> None:
    """Of 2 completions: one right of two (wrong: 5), then both wrong. Of two functions each has its name in front."""
    rewards = [1.0, 0.0, 0.0, 0.0]
    expected = {"pass@1": 0.25, "pass@2": 0.5}
    assert group_metrics({"f": rewards}, None, 2) == expected
    assert group_metrics({"f": rewards}, ["4", "5", "5", None], 2) == {**expected, "maj@2": 0.25}
    both = group_metrics({"f": rewards, "g": [1.0] * 4}, None, 2)
    assert both == {f"rewards/f/{name}": value for name, value in expected.items()} | {
        "rewards/g/pass@1": 1.0,
        "rewards/g/pass@2": 1.0,
    }


def test_what_is_no_right_or_wrong_is_left_out() -> None:
    assert group_metrics({"length": [3.0, 0.0], "penalty": [-1.0, 0.0]}, None, 2) == {}
    assert group_metrics({"f": [math.nan, 1.0, 1.0, 0.0]}, None, 2) == {"pass@1": 0.5, "pass@2": 1.0}
    assert group_metrics({"f": [math.nan, math.nan]}, None, 2) == {}


def test_answers_are_told_only_where_the_gold_answer_is_one() -> None:
    """Of messages the last one speaks."""
    messages = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": r"\boxed{7}"}]
    rows: list[dict[str, object]] = [{"answer": "7"}, {"answer": "8"}]
    assert answers_of(rows, [messages, "no idea"]) == [(True, "7"), (True, None)]
    assert answers_of([{"answer": "blue"}], [r"\boxed{7}"]) == [(False, None)]
    assert answers_of([{"prompt": "7"}], [r"\boxed{7}"]) == [(False, None)]


def even_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """1 for an even last token."""
    return [float(ids[-1] % 2 == 0) for ids in completion_ids]


@pytest.mark.parametrize("columns", [{}, {"answer": ["1", "2"]}])
def test_an_evaluation_logs_them_beside_its_means(
    tmp_path: Path, tiny_model_dir: str, columns: dict[str, list[str]]
) -> None:
    config = make_config(tmp_path, per_device_eval_batch_size=4)
    data = Dataset.from_dict({"prompt": ["w1 w2", "w3"], **columns})
    trainer = build(SpyTrainer, tiny_model_dir, config, eval_dataset=data, reward_funcs=even_reward)
    logged = trainer.evaluate()
    groups = [evaluation["rewards"].flatten().tolist() for evaluation in trainer.evaluations]
    assert [len(group) for group in groups] == [4, 4]
    assert logged["eval_pass@1"] == pytest.approx(logged["eval_reward"])
    assert logged["eval_pass@4"] == pytest.approx(sum(any(group) for group in groups) / 2)
    assert ("eval_maj@4" in logged) == bool(columns)
    assert "eval_maj@1" not in logged  # the same as pass@1
