"""Repetition: laws of the definition, its cost, and its errors on labelled strings."""

import json
import random
import string
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.paths import ROOT
from treepo_trl.sampling import stopping
from treepo_trl.sampling.stopping import MIN_REPEATED_CHARACTERS, MIN_REPEATS, is_repetitive


def words(num_characters: int, seed: int = 0) -> str:
    """Text without loops."""
    rng = random.Random(seed)
    return "".join(rng.choice(string.ascii_lowercase + "   ") for _ in range(num_characters))


# What is a loop


def test_thresholds() -> None:
    # The numbers in the docstring of `is_repetitive` and in the names of the tests below.
    assert (MIN_REPEATED_CHARACTERS, MIN_REPEATS) == (1024, 4)


@pytest.mark.parametrize("period", [1, 2, 31, 32, 33, 255, 256, 257, 260, 513, 700, 3000])
def test_the_shortest_loop(period: int) -> None:
    """Four repeats and 1024 characters. The released detector misses seven repeats of 260 characters."""
    loop = words(period, seed=2) * (1024 // period + 5)
    shortest = max(1024, 4 * period)
    assert is_repetitive("#" + loop[-shortest:])
    assert not is_repetitive("#" + loop[-shortest + 1 :])


def test_a_loop_inside_a_unit_that_repeats_is_found() -> None:
    # The last characters occur with a short distance too, which is not the period.
    assert is_repetitive(words(200) + ("-" * 400 + words(100, seed=5) + "-" * 400) * 5)


def test_a_loop_in_front_of_ordinary_text_does_not_hide_one_at_the_end() -> None:
    assert is_repetitive("ab" * 900 + words(100, seed=6) + "cd" * 900)


@pytest.mark.parametrize("text", ["", "a" * 1023, words(4000), words(260, seed=1) * 7 + words(200, seed=6)])
def test_short_and_ordinary_texts_and_loops_before_their_end_are_none(text: str) -> None:
    assert not is_repetitive(text)


@pytest.mark.parametrize("incomplete", range(4))
def test_a_loop_of_emoji_is_found_when_a_segment_ends_inside_one(incomplete: int) -> None:
    # Bytes of an incomplete character decode to one U+FFFD together or to one each.
    assert is_repetitive("Well done " + "🎉👍" * 600 + "\ufffd" * incomplete)
    assert is_repetitive("\ufffd" * (1027 + incomplete))


# Exactly the definition


def reference(text: str, min_characters: int, min_repeats: int) -> bool:
    """The definition, tried for every period."""
    tails = ((max(min_characters, min_repeats * p), p) for p in range(1, len(text) // min_repeats + 1))
    return any(tail <= len(text) and text[-tail:-p] == text[len(text) - tail + p :] for tail, p in tails)


pieces = st.lists(st.tuples(st.text(alphabet="ab", min_size=1, max_size=70), st.integers(1, 30)), max_size=4)


@given(pieces, st.integers(1, 6))
def test_found_is_what_the_definition_says(pieces: list[tuple[str, int]], repeats: int) -> None:
    text = "".join(unit * repeats for unit, repeats in pieces) * repeats
    assert is_repetitive(text) == reference(text, 1024, 4)


@given(st.integers(1, 400), st.integers(0, 4000), st.lists(st.integers(0, 3999), max_size=3), st.integers(0, 9))
def test_nearly_periodic_texts_are_judged_as_defined(period: int, length: int, flips: list[int], seed: int) -> None:
    rng = random.Random(seed)
    unit = [rng.choice("ab") for _ in range(period)]
    text = [unit[i % period] for i in range(length)]
    for flip in flips:
        if flip < length:
            text[flip] = "b" if text[flip] == "a" else "a"
    assert is_repetitive("".join(text)) == reference("".join(text), 1024, 4)


@pytest.mark.parametrize(("min_characters", "min_repeats"), [(8, 4), (16, 4), (9, 3), (20, 5)])
def test_every_short_text_is_judged_as_defined(
    monkeypatch: pytest.MonkeyPatch, min_characters: int, min_repeats: int
) -> None:
    # All texts of up to 10 letters over {0, 1}, repeated and behind loops: small thresholds reach every branch.
    monkeypatch.setattr(stopping, "MIN_REPEATED_CHARACTERS", min_characters)
    monkeypatch.setattr(stopping, "MIN_REPEATS", min_repeats)
    found = 0
    for length in range(1, 11):
        for bits in range(2**length):
            end = format(bits, f"0{length}b")
            for text in (end, end * 3, end * 4, end * 5 + end[:-1], (end * 2 + "0") * 4, "01" * 9 + end):
                expected = reference(text, min_characters, min_repeats)
                assert is_repetitive(text) == expected, text
                found += expected
    assert found > 1000


# Linear cost


MAX_TOUCHED = 13
"""Characters touched per character: one to turn it around, 5 in searches (probes add up to 2), 7 in comparisons."""


class Counted(str):
    """A string that counts the characters its slices, searches and comparisons touch."""

    touched = 0

    def __getitem__(self, key: slice) -> "Counted":
        part = Counted(super().__getitem__(key))
        Counted.touched += len(part)
        return part

    def find(self, sub: str, start: int, end: int) -> int:
        # What a search in linear time touches: from the start to the end of the occurrence, and what it looks for.
        position = super().find(sub, start, end)
        last = min(end, len(self)) if position < 0 else position + len(sub)
        Counted.touched += max(last - start, 0) + len(sub)
        return position

    def __eq__(self, other: object) -> bool:
        Counted.touched += len(self)
        return super().__eq__(other)

    __hash__ = str.__hash__


def touched(text: str) -> int:
    Counted.touched = 0
    is_repetitive(Counted(text))
    return Counted.touched


def fibonacci_word(length: int) -> str:
    """Full of squares, but nothing in it repeats four times."""
    shorter, longer = "a", "ab"
    while len(longer) < length:
        shorter, longer = longer, longer + shorter
    return longer[:length]


@pytest.mark.parametrize("length", [2_000, 30_000, 300_000])
def test_cost_is_linear_whatever_the_text(length: int) -> None:
    texts = [
        "a" * length,
        "a" * (length - 1000) + "b" + "a" * 999,  # the end occurs everywhere, no period fits
        "".join(["-" * 40 + f"{i}\n" for i in range(length // 40)])[: length - 40] + "-" * 40,
        "".join(["ab" * 50 + str(i) for i in range(length // 100)])[: length - 100] + "ab" * 50,
        fibonacci_word(length),
        fibonacci_word(length)[::-1],
        words(length // 3) * 3,
        words(length // 5) * 4 + words(length // 5, seed=1),
    ]
    assert max(touched(text) / length for text in texts) < MAX_TOUCHED


@given(pieces, st.integers(1, 20))
@example(pieces=[("a", 500), ("b", 1), ("a", 29)], repeats=20)
def test_cost_of_nearly_periodic_texts_is_linear(pieces: list[tuple[str, int]], repeats: int) -> None:
    text = "".join(unit * repeats for unit, repeats in pieces) * repeats
    assert touched(text) <= MAX_TOUCHED * max(len(text), 1024)


def test_ordinary_text_costs_one_search_in_a_quarter_of_it() -> None:
    # Turned around, then searched: 30,000 + 7,500 characters and twice the 256 looked for (and cut out).
    assert touched(words(30_000)) <= 30_000 + 7_500 + 3 * 256


# Labelled strings


class Labelled(NamedTuple):
    """
    A completion, or its end; `kind` says what it looks like, "model" that SmolLM2-135M-Instruct wrote it.

    `mistake` says why the rule is known to judge it wrongly.
    """

    name: str
    kind: str
    is_loop: bool
    text: str
    mistake: str | None = None


def load() -> list[Labelled]:
    with (ROOT / "tests/data" / "repetition.jsonl").open(encoding="utf-8") as lines:
        return [Labelled(**json.loads(line)) for line in lines]


LABELLED = load()


def fires_on_the_way(text: str) -> bool:
    """Whether a path would end at this text or at any of its beginnings, 16 characters apart."""
    return is_repetitive(text) or any(is_repetitive(text[:end]) for end in range(16, len(text), 16))


def test_mistakes_are_the_known_ones() -> None:
    assert len({row.name for row in LABELLED}) == len(LABELLED) == 190 + 106
    # 3 of 190 strings without a loop, 1.6 %: each is tried at all its beginnings. 16 of 106 loops, 15.1 %.
    wrong = [row for row in LABELLED if row.is_loop != (is_repetitive if row.is_loop else fires_on_the_way)(row.text)]
    assert [row.name for row in wrong if row.mistake is None] == []
    assert (sum(not row.is_loop for row in wrong), sum(row.is_loop for row in wrong)) == (3, 16)
