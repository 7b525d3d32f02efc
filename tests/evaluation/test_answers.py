"""Answers of texts and their comparison, through math-verify."""

import threading

import pytest

from treepo_trl.evaluation.answers import judge_math, math_answer


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        (r"So it is \boxed{72}.", "72", 1.0),
        ("The answer is 72.", "72", 1.0),
        (r"First 5, then \boxed{\frac{1}{2}}. I am sure of 3 things.", "0.5", 1.0),
        (r"\boxed{1{,}000}", "1,000", 1.0),
        (r"\boxed{71}", "72", 0.0),
        ("I do not know.", "72", 0.0),
    ],
)
def test_equal_answers_are_right_however_they_are_written(text: str, gold: str, score: float) -> None:
    assert judge_math(text, gold).score == score


def test_equal_wrong_answers_have_one_name() -> None:
    first, second, other = (judge_math(text, "9") for text in (r"\boxed{1/2}", r"It is $\frac{1}{2}$", r"\boxed{2}"))
    assert first.answer == second.answer != other.answer
    assert math_answer("no idea") is judge_math("no idea", "9").answer is None


def test_answers_are_read_outside_of_the_main_thread_too() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(judge_math(r"\boxed{17}", "17").score))
    thread.start()
    thread.join()
    assert found == [1.0]
