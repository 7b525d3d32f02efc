"""Additions, their held-out set, their reward and their metric."""

import pytest

from treepo_trl.quickstart import AnswerAccuracy, addition_tasks, answer_reward, last_number


def test_held_out_tasks_differ_from_each_other_and_from_training() -> None:
    train, held_out = addition_tasks(300, 64, seed=1)
    assert (len(train), len(held_out)) == (300, 64)
    held_out_questions = [prompt[-1]["content"] for prompt in held_out["prompt"]]
    assert len(set(held_out_questions)) == 64
    assert not set(held_out_questions) & {prompt[-1]["content"] for prompt in train["prompt"]}


def test_answers_are_the_sums() -> None:
    train, held_out = addition_tasks(50, 10, seed=2)
    for row in [*train, *held_out]:
        terms = [int(term) for term in row["prompt"][-1]["content"].split("+")]
        assert len(terms) == 3
        assert row["answer"] == str(sum(terms))


def test_tasks_depend_on_the_seed_alone() -> None:
    first, again, other = (addition_tasks(20, 5, seed=s)[0]["prompt"][:] for s in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3 + 4 = 7, 7 + 5 = 12", "12"), ("12.", "12"), ("It is -3", "-3"), ("no number", ""), ("", "")],
)
def test_last_number(text: str, expected: str) -> None:
    assert last_number(text) == expected


def test_reward_is_one_for_the_right_last_number() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in ("7, 12", "12, 7", "")]
    assert answer_reward(completions, answer=["12", "12", "12"]) == [1.0, 0.0, 0.0]


def test_accuracy_counts_parsed_answers() -> None:
    result = AnswerAccuracy(last_number).compute(
        predictions=["is 3", "4", "none", "5 6"], references=["3", "4", "5", "5"]
    )
    assert result == {"accuracy": 0.5}  # the first two of four
