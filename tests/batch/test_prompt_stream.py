"""The stream of prompts that dynamic sampling draws from."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from treepo_trl.batch.prompt_stream import PromptStream


def rows(count: int) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i}" for i in range(count)]})


def prompts_of(examples: list[dict[str, Any]]) -> list[str]:
    return [example["prompt"] for example in examples]


@given(size=st.integers(1, 9), takes=st.lists(st.integers(0, 7), max_size=8), shuffle=st.booleans())
def test_each_pass_holds_each_example_once(size: int, takes: list[int], shuffle: bool) -> None:
    stream = PromptStream(rows(size), shuffle, seed=3)
    drawn = [prompt for count in takes for prompt in prompts_of(stream.take(count))]
    assert len(drawn) == sum(takes)
    for start in range(0, len(drawn), size):
        part = drawn[start : start + size]
        assert max(Counter(part).values()) == 1
        if not shuffle:
            assert part == [f"w{i}" for i in range(len(part))]


@given(size=st.integers(1, 9), before=st.integers(0, 25), after=st.integers(1, 12), shuffle=st.booleans())
def test_a_stream_goes_on_at_its_position(size: int, before: int, after: int, shuffle: bool) -> None:
    stream = PromptStream(rows(size), shuffle, seed=3)
    stream.take(before)
    again = PromptStream(rows(size), shuffle, seed=3, position=stream.position)
    assert again.take(after) == stream.take(after)
    assert again.position == stream.position


def test_the_order_is_trls() -> None:
    """Two passes of GRPOTrainer's sampler, which leaves out what does not fill a batch of 3."""
    theirs = RepeatSampler(rows(9), mini_repeat_count=1, batch_size=3, shuffle=True, seed=5)
    expected = [f"w{i}" for _ in range(2) for i in theirs]
    assert prompts_of(PromptStream(rows(9), shuffle=True, seed=5).take(18)) == expected
    assert expected[:9] != expected[9:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_iterable_dataset_streams_too(shuffle: bool) -> None:
    def generate() -> Iterator[dict[str, str]]:
        yield from ({"prompt": f"w{i}"} for i in range(5))

    def stream(position: tuple[int, int] = (0, 0)) -> PromptStream:
        return PromptStream(IterableDataset.from_generator(generate), shuffle, 3, position)

    whole = stream()
    drawn = prompts_of(whole.take(15))
    for start in (0, 5, 10):
        assert sorted(drawn[start : start + 5]) == [f"w{i}" for i in range(5)]
    assert (drawn[:5] != drawn[5:10]) is shuffle
    assert prompts_of(stream((1, 2)).take(4)) == drawn[7:11]


def test_a_dataset_without_examples_is_an_error() -> None:
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="gave no example"):
        PromptStream(empty, shuffle=False, seed=0).take(1)
    stream = PromptStream(rows(2), shuffle=False, seed=0, position=(0, 2))
    assert prompts_of(stream.take(1)) == ["w0"]  # a pass that is used up is none
