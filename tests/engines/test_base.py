"""What the types that every engine shares refuse."""

import re
from dataclasses import fields
from typing import Any

import pytest

from treepo_trl.engines import SamplingOptions


@pytest.mark.parametrize(
    ("name", "allowed", "refused", "words"),
    [
        ("temperature", (0.0, 2.0), (-1.0,), "0 (greedy) or more"),
        ("top_p", (1e-6, 1.0), (0.0, 1.5), "above 0 and at most 1 (all tokens)"),
        ("top_k", (-1, 0, 50), (-2,), "0 or -1 (all tokens) or more"),
        ("min_p", (None, 0.0, 1.0), (-0.1, 1.1), "between 0 (all tokens) and 1"),
        ("repetition_penalty", (0.1, 1.0), (0.0, -1.0), "above 0 (1 is none)"),
    ],
)
def test_ranges_of_the_sampling_options(name: str, allowed: tuple, refused: tuple, words: str) -> None:
    for value in allowed:
        assert getattr(SamplingOptions(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=re.escape(f"`{name}` is {value}; it must be {words}.")):
            SamplingOptions(**{name: value})


@pytest.mark.parametrize("name", [each.name for each in fields(SamplingOptions)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", [1]])
def test_sampling_options_are_finite_numbers(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^`{name}` is .*; it must be a (whole|finite)? ?number"):
        SamplingOptions(**{name: value})
