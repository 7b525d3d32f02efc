"""Pass rates and the prompts that they pass over, by hand and by their laws."""

import json
from collections import Counter
from math import inf, nan
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.support.trainers import labelled
from treepo_trl.batches import prompt_selection
from treepo_trl.batches.prompt_selection import LEAST_CHANCE, PassRates, SelectedPrompts
from treepo_trl.batches.prompt_stream import PromptStream


WRONG, RIGHT, OTHER = ({"prompt": name, "answer": "7"} for name in ("wrong", "right", "other"))


def rates_of(*rewards: list[float], examples: tuple[dict[str, object], ...] = (WRONG, RIGHT, OTHER)) -> PassRates:
    rates = PassRates()
    rates.learn(list(examples[: len(rewards)]), torch.tensor(rewards))
    return rates


def test_chances_by_hand() -> None:
    rates = rates_of([0.0] * 7, [1.0] * 7, [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, nan])
    assert rates.chance(WRONG) == pytest.approx(4 * (0.5 / 8) * (7.5 / 8))
    assert rates.chance(RIGHT) == pytest.approx(4 * (7.5 / 8) * (0.5 / 8))
    assert rates.chance(OTHER) == pytest.approx(1.0)  # 3.5 of 7
    rates.learn([WRONG], torch.zeros(1, 7))
    assert rates.chance(WRONG) == LEAST_CHANCE  # 4 * 0.5 / 11.5 * 11 / 11.5 is 0.17
    rates.learn([WRONG], torch.ones(1, 8))
    assert rates.chance(WRONG) == pytest.approx(4 * (8.5 / 14.25) * (5.75 / 14.25))  # earlier visits: 10.5 / 2


def test_no_more_is_known_than_was_seen() -> None:
    assert PassRates().chance(WRONG) == 1
    assert rates_of([0.0, 1.0]).chance(OTHER) == 1
    assert rates_of([0.0, 0.0], [0.0, 0.0]).chance(WRONG) == 1  # whether 0 is little or much
    assert rates_of([nan, nan], [0.0, 1.0]).chance(WRONG) == 1
    unscored = rates_of([0.0, nan, -inf], [0.0, 1.0, inf])
    assert unscored.chance(WRONG) == pytest.approx(4 * (0.5 / 2) * (1.5 / 2))


@pytest.mark.parametrize(("scale", "shift"), [(4.0, -1.0), (-1.0, 0.0), (0.01, 100.0)])
def test_chances_do_not_depend_on_the_scale_of_rewards(scale: float, shift: float) -> None:
    rewards = torch.tensor([[0.0] * 8, [1.0] * 8, [0.0, 0.25, 0.5, 0.25, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    plain, scaled = PassRates(), PassRates()
    plain.learn([WRONG, RIGHT, OTHER], rewards)
    scaled.learn([WRONG, RIGHT, OTHER], scale * rewards + shift)
    for example in (WRONG, RIGHT, OTHER):
        assert scaled.chance(example) == pytest.approx(plain.chance(example))


def test_equal_rows_are_one_prompt_and_others_are_not() -> None:
    rates = rates_of([0.0] * 8, [1.0] * 8)
    assert rates.chance(dict(WRONG)) == rates.chance(WRONG) < 1
    assert rates.chance({**WRONG, "answer": "8"}) == 1
    conversation: dict[str, object] = {"prompt": [{"role": "user", "content": "w1 w2"}], "image": torch.ones(3)}
    rates.learn([conversation], torch.zeros(1, 8))
    again: dict[str, object] = {"prompt": [{"role": "us" + "er", "content": " ".join(["w1", "w2"])}]}
    assert rates.chance({**again, "image": torch.ones(3)}) < 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_selection, "_MOST_PROMPTS", 2)
    rates = rates_of([0.0] * 8, [1.0] * 8)
    rates.learn([WRONG], torch.zeros(1, 8))
    rates.learn([OTHER], torch.zeros(1, 8))
    assert rates.chance(RIGHT) == 1  # the one that was visited longest ago
    assert rates.chance(WRONG) < 1
    assert rates.chance(OTHER) < 1


def test_what_is_saved_is_all_and_does_not_change() -> None:
    rates = rates_of([0.0] * 8, [1.0] * 8)
    text = json.dumps(rates.saved, allow_nan=False)
    before = rates.saved
    chance = rates.chance(WRONG)
    rates.learn([WRONG], torch.ones(1, 8))
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
    rates.learn([rows[3]], torch.zeros(1, 8))
    stream = stream_of(dataset.to_iterable_dataset() if is_streamed else dataset, rates)
    taken: Counter[object] = Counter()
    while stream.position[0] < 300:
        taken.update(prompts(stream.take(1)))
    assert {taken[f"w{i}"] for i in range(3)} <= {299, 300, 301}
    assert 300 * LEAST_CHANCE - 28 < taken["w3"] < 300 * LEAST_CHANCE + 28  # four standard deviations of 6.9
    number, row = stream.position
    assert stream.num_passed_over == 4 * number + row - taken.total()


def test_a_stream_goes_on_where_it_was() -> None:
    dataset = labelled("vzvzzvzzzz")
    rates = PassRates()
    rates.learn(list(dataset), torch.tensor([[0.0, float(kind == "v")] * 4 for kind in dataset["kind"]]))  # pyright: ignore
    whole = stream_of(dataset, rates)
    whole.take(7)
    resumed = stream_of(dataset, PassRates(rates.saved), position=whole.position)
    assert prompts(resumed.take(40)) == prompts(whole.take(40))
    assert resumed.position == whole.position


def test_an_empty_dataset_is_an_error_here_too() -> None:
    with pytest.raises(ValueError, match="Pass 1 over the training dataset gave no example"):
        stream_of(labelled(""), PassRates()).take(1)
