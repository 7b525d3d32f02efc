"""Bootstrap intervals: what they must be where it can be said by hand."""

import pytest

from treepo_trl.evaluation import Estimate, estimates


def test_one_prompt_and_equal_prompts_have_no_width() -> None:
    assert estimates({"a": [0.25]})["a"] == Estimate(0.25, 0.25, 0.25)
    assert estimates({"a": [0.5] * 9})["a"] == Estimate(0.5, 0.5, 0.5)


def test_interval_of_many_prompts_is_that_of_the_normal_distribution() -> None:
    """400 prompts, half of them right: a standard error of 0.5 / 20, so 0.5 -+ 1.96 * 0.025."""
    estimate = estimates({"a": [0.0, 1.0] * 200})["a"]
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == pytest.approx((0.451, 0.549), abs=0.004)


def test_all_metrics_are_drawn_on_the_same_prompts() -> None:
    """A difference of equal prompts is sure, however unsure both sides are."""
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = estimates({"a": values, "b": [1 - value for value in values]})
    assert found["a"].low == pytest.approx(1 - found["b"].high)
    assert estimates({"a": values}) == {"a": found["a"]}
