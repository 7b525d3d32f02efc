"""Pass rates and the prompts that they pass over, by hand and by their laws."""

import json
import math
from collections import Counter
from itertools import product
from math import inf, nan
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from tests.support.trainers import labelled
from treepo_trl.batch import prompt_selection
from treepo_trl.batch.prompt_selection import LEAST_CHANCE, PassRates, SelectedPrompts, differing_pairs
from treepo_trl.batch.prompt_stream import PromptStream


WRONG, RIGHT, OTHER = ({"prompt": name, "answer": "7"} for name in ("wrong", "right", "other"))


def rates_of(*rewards: list[float], examples: tuple[dict[str, object], ...] = (WRONG, RIGHT, OTHER)) -> PassRates:
    rates = PassRates()
    rates.learn(list(examples[: len(rewards)]), torch.tensor(rewards))
    return rates


def test_shares_of_pairs_by_hand() -> None:
    assert differing_pairs(torch.tensor([0.0, 1.0])) == 1
    assert differing_pairs(torch.tensor([0.0] * 6 + [1.0] * 2)) == pytest.approx(12 / 28)
    assert differing_pairs(torch.tensor([0.3, 0.1, 0.2, 0.3])) == pytest.approx(5 / 6)
    for without in ([1.0, 1.0, 1.0], [nan, 1.0, inf], [nan, nan], [1.0]):
        assert differing_pairs(torch.tensor(without)) == 0


@given(p=st.floats(0, 1), n=st.integers(2, 6))
def test_the_share_is_unbiased(p: float, n: int) -> None:
    """Over all outcomes of `n` completions that are right with probability `p`."""
    outcomes = list(product((0.0, 1.0), repeat=n))
    chances = [math.prod(p if each else 1 - p for each in outcome) for outcome in outcomes]
    mean = sum(c * differing_pairs(torch.tensor(o)) for c, o in zip(chances, outcomes, strict=True))
    assert mean == pytest.approx(2 * p * (1 - p), abs=1e-9)


def test_chances_by_hand() -> None:
    rates = rates_of([0.0] * 8, [1.0] * 8, [0.0] * 6 + [1.0, 1.0])
    assert rates.chance(WRONG) == rates.chance(RIGHT) == LEAST_CHANCE  # 2 x 1 / 10
    assert rates.chance(OTHER) == pytest.approx(2 * (8 * 12 / 28 + 1) / 10)
    rates.learn([WRONG], torch.tensor([[0.0, 1.0, 0.0, 0.0]]))  # 2 of 4 pairs, after 8 / 2 completions without any
    assert rates.chance(WRONG) == pytest.approx(2 * (4 * 0.5 + 1) / (4 + 4 + 2))
    assert rates_of([0.0] * 2).chance(WRONG) == pytest.approx(0.5)  # two completions say little
    assert rates_of([0.0] * 16).chance(WRONG) == LEAST_CHANCE  # 2 x 1 / 18 is less
    assert rates_of([0.0, 1.0, 2.0, 3.0]).chance(WRONG) == 1
    for seen in ([0.0, 1.0], [0.0] * 4, [1.0]):  # rows that a tree lacks say nothing
        assert rates_of([*seen, nan, nan, nan]).chance(WRONG) == rates_of(seen).chance(WRONG)


def test_no_more_is_known_than_was_seen() -> None:
    assert PassRates().chance(WRONG) == 1
    assert not PassRates().knows(WRONG)
    rates = rates_of([nan] * 8)
    assert rates.knows(WRONG)
    assert rates.chance(WRONG) == LEAST_CHANCE  # no completion was scored: it had no signal
    assert rates.chance(OTHER) == 1


@pytest.mark.parametrize(("scale", "shift"), [(4.0, -1.0), (-1.0, 0.0), (0.01, 100.0)])
def test_chances_do_not_depend_on_the_scale_of_rewards(scale: float, shift: float) -> None:
    """Also not when it changes, or with an outlier of another prompt."""
    rewards = torch.tensor([[0.0] * 8, [1.0] * 8, [0.0, 0.25, 0.5, 0.25, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    plain, scaled = PassRates(), PassRates()
    plain.learn([WRONG, RIGHT, OTHER], rewards)
    plain.learn([WRONG, RIGHT], rewards[:2])
    scaled.learn([WRONG, RIGHT, OTHER], scale * rewards + shift)
    scaled.learn([WRONG, RIGHT, {"prompt": "outlier"}], torch.cat([rewards[:2], torch.full((1, 8), -1e9)]))
    for example in (WRONG, RIGHT, OTHER):
        assert scaled.chance(example) == plain.chance(example)


def test_equal_rows_are_one_prompt_and_others_are_not() -> None:
    rates = rates_of([0.0] * 8, [1.0] * 8)
    assert rates.chance(dict(WRONG)) == rates.chance(WRONG) < 1
    assert rates.chance({**WRONG, "answer": "8"}) == 1
    conversation: dict[str, object] = {"prompt": [{"role": "user", "content": "w1 w2"}], "image": torch.ones(3)}
    rates.learn([conversation], torch.zeros(1, 8))
    again: dict[str, object] = {"prompt": [{"role": "us" + "er", "content": " ".join(["w1", "w2"])}]}
    assert rates.chance({**again, "image": torch.ones(3)}) < 1


def test_a_prompt_that_is_twice_in_a_batch_is_one_visit() -> None:
    twice, once = PassRates(), PassRates()
    twice.learn([WRONG, WRONG], torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]))
    once.learn([WRONG], torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]))
    (pair,), (other,) = twice.saved.values(), once.saved.values()
    assert pair == [4 * 0.5 + 4 * 0.5, 8]
    assert other == [pytest.approx(8 * 16 / 28), 8]


def test_memory_is_bounded_whatever_the_order_of_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_selection, "_MOST_PROMPTS", 4)
    rows: list[dict[str, object]] = [{"prompt": f"w{i}"} for i in range(12)]
    remembered = []
    for order in (rows, rows[::-1]):
        rates = PassRates()
        for each in [*order, *order]:
            rates.learn([each], torch.zeros(1, 8))
        remembered.append([each for each in rows if rates.knows(each)])
        # As a checkpoint has it: transformers sorts the keys.
        again = PassRates(json.loads(json.dumps(rates.saved, sort_keys=True)))
        for each in rows:
            rates.learn([each], torch.ones(1, 8))
            again.learn([each], torch.ones(1, 8))
        assert again.saved == rates.saved
    assert remembered[0] == remembered[1]
    assert len(remembered[0]) == 4


def test_what_is_saved_is_all_and_does_not_change() -> None:
    rates = rates_of([0.0] * 8, [1.0] * 8)
    text = json.dumps(rates.saved, allow_nan=False)
    before = rates.saved
    chance = rates.chance(WRONG)
    rates.learn([WRONG], torch.tensor([[0.0, 1.0] * 4]))
    assert json.dumps(before) == text
    assert PassRates(json.loads(text)).chance(WRONG) == chance != rates.chance(WRONG)


def stream_of(dataset: Dataset | IterableDataset, rates: PassRates, **place: Any) -> SelectedPrompts:
    return SelectedPrompts(PromptStream(dataset, shuffle=True, seed=3, **place), rates, seed=3)


def prompts(examples: list[dict[str, object]]) -> list[object]:
    return [example["prompt"] for example in examples]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_shares_in_the_long_run(is_streamed: bool) -> None:
    """Of 300 passes, a hopeless prompt is taken in a fifth, others in all, and never twice in one pass."""
    dataset = labelled("vvvz")
    rows: list[Any] = list(dataset)
    rates = PassRates()
    rates.learn(rows, torch.tensor([[0.0, 1.0] * 4] * 3 + [[0.0] * 8]))
    stream = stream_of(dataset.to_iterable_dataset() if is_streamed else dataset, rates)
    taken: Counter[object] = Counter()
    while stream.position[0] < 300:
        taken.update(prompts(stream.take(1)))
    assert {taken[f"w{i}"] for i in range(3)} <= {299, 300, 301}
    assert 300 * LEAST_CHANCE - 28 < taken["w3"] < 300 * LEAST_CHANCE + 28  # four standard deviations of 6.9
    number, row = stream.position
    metrics = stream.learn([], torch.zeros(0, 8))
    assert metrics["prompt_selection/frac_passed_over"] == pytest.approx(1 - taken.total() / (4 * number + row))
    assert metrics["prompt_selection/frac_known"] == 1


def test_a_stream_goes_on_where_it_was() -> None:
    dataset = labelled("vzvzzvzzzz")
    rates = PassRates()
    rates.learn(list(dataset), torch.tensor([[0.0, float(kind == "v")] * 4 for kind in dataset["kind"]]))  # pyright: ignore
    whole = stream_of(dataset, rates)
    whole.take(7)
    resumed = stream_of(dataset, PassRates(rates.saved), position=whole.position)
    assert prompts(resumed.take(40)) == prompts(whole.take(40))
    assert resumed.position == whole.position


def test_a_row_without_a_hash_is_named_by_its_column() -> None:
    """A transform may give anything."""
    with pytest.raises(ValueError, match=r"the column 'words' cannot be hashed \(cannot pickle 'generator' object\)"):
        PassRates().chance({"prompt": "a", "words": (word for word in "abc")})
