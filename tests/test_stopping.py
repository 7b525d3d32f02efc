"""When a path ends: EOS, repetition, and the text of a path that grows segment by segment."""

import random
import re
import string
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_trl.stopping import extend_text, find_eos, find_match_end, is_repetitive, tokens_until


# EOS


@pytest.mark.parametrize(
    ("token_ids", "eos_token_ids", "position"),
    [
        ([5, 6, 0], [0], 2),
        ([0, 5, 6], [0], 0),  # the very first token (the released code never looks at it)
        ([0], [0], 0),
        ([5, 2, 0], [0, 2], 1),  # several EOS tokens, as in instruct models: the first that occurs
        ([5, 0, 2], {2, 0}, 1),
        ([5, 0, 0], (0,), 1),
        ([5, 6], [0], None),
        ([], [0], None),
        ([5, 0], [], None),
    ],
)
def test_first_eos(token_ids: list[int], eos_token_ids: list[int], position: int | None) -> None:
    assert find_eos(token_ids, eos_token_ids) == position


# Repetition


def words(num_characters: int, seed: int = 0) -> str:
    """Text without loops."""
    rng = random.Random(seed)
    return "".join(rng.choice(string.ascii_lowercase + "   ") for _ in range(num_characters))


def test_a_260_character_loop_repeated_seven_times_is_found() -> None:
    # The released detector (32 characters, 8 occurrences) misses it.
    assert is_repetitive(words(500) + words(260, seed=1) * 7)


@pytest.mark.parametrize("period", [1, 2, 31, 32, 33, 63, 64, 65, 100, 260, 1000])
def test_four_repeats_of_at_least_256_characters_are_a_loop_whatever_the_period(period: int) -> None:
    unit = words(period, seed=2)
    repeats = max(4, -(-256 // period))
    assert is_repetitive(words(300, seed=3) + unit * repeats)
    assert is_repetitive(unit * repeats)  # nothing in front of it


@pytest.mark.parametrize("period", [64, 65, 100, 260, 1000])
def test_three_repeats_are_no_loop(period: int) -> None:
    assert not is_repetitive(words(300, seed=3) + "#" + words(period, seed=2) * 3)


@pytest.mark.parametrize("cut", [1, 17, 31, 32, 33, 100, 259])
def test_a_loop_that_stops_in_the_middle_of_its_unit_is_found(cut: int) -> None:
    unit = words(260, seed=4)
    assert is_repetitive(words(500) + unit * 4 + unit[:cut])


def test_a_loop_inside_a_unit_that_repeats_is_found() -> None:
    # The last 32 characters occur with a short distance too, which is not the period.
    assert is_repetitive(words(200) + ("-" * 40 + words(100, seed=5) + "-" * 40) * 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 255,
        words(4000),
        # 40 equal characters in a table, which the released detector takes for a loop
        "| name | value |\n|" + "-" * 40 + "|" + "-" * 40 + "|\n| x | 3 |\n",
        words(300) + "\n" + "-" * 40,
        words(300) + "\n" + "=" * 80,
        words(300) + " \\underline{" + "\\hspace{1cm}" * 8 + "}",
        words(300) + "\\\\ \\hline" * 4,
        words(300) + r"\begin{array}{c|c}" + r"\hline 1 & 2 \\ " * 12,
        # digits: 1/7 to 60 places, 1/3 to 100, a million written out, powers of two
        words(300) + "0." + "142857" * 10,
        words(300) + "0." + "3" * 100,
        words(300) + "1" + ",000" * 12,
        words(300) + " ".join(str(2**i) for i in range(40)),
        # counting: every line differs
        words(300) + "".join(f"Step {i}: add {i} and {i + 1} to get {2 * i + 1}.\n" for i in range(60)),
    ],
)
def test_ordinary_text_is_no_loop(text: str) -> None:
    assert not is_repetitive(text)


def test_only_the_end_of_the_text_counts() -> None:
    assert not is_repetitive(words(260, seed=1) * 7 + words(200, seed=6))


def test_a_loop_in_front_of_ordinary_text_does_not_hide_one_at_the_end() -> None:
    assert is_repetitive("ab" * 300 + words(100, seed=6) + "cd" * 300)


@given(st.integers(1, 400), st.integers(0, 300), st.integers(0, 99), st.integers(0, 500))
def test_every_long_enough_tail_loop_is_found(period: int, prefix: int, seed: int, extra: int) -> None:
    unit = words(period, seed)
    length = max(256, 4 * period) + extra
    assert is_repetitive(words(prefix, seed + 1) + (unit * (length // period + 1))[:length])


def reference(text: str) -> bool:
    """The definition, tried for every period."""
    tails = ((max(256, 4 * period), period) for period in range(1, len(text) // 4 + 1))
    return any(
        tail <= len(text) and all(text[-i] == text[-i - period] for i in range(1, tail - period + 1))
        for tail, period in tails
    )


@given(st.lists(st.tuples(st.text(alphabet="ab", min_size=1, max_size=70), st.integers(1, 12)), max_size=4))
def test_found_is_what_the_definition_says(pieces: list[tuple[str, int]]) -> None:
    text = "".join(unit * repeats for unit, repeats in pieces)
    assert is_repetitive(text) == reference(text)


@pytest.mark.parametrize("length", [254, 255, 256, 257])
def test_the_shortest_loop_has_256_characters(length: int) -> None:
    assert is_repetitive("#" + "ab" * 200)
    assert is_repetitive("#" + ("ab" * 200)[-length:]) == (length >= 256)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 40_000 + "b" + "a" * 200,  # the last 32 characters occur everywhere, no period fits
        "".join("-" * 40 + f"{i}\n" for i in range(1000)) + "-" * 40,
        "".join("ab" * 50 + str(i) for i in range(400)) + "ab" * 50,
    ],
)
def test_texts_that_nearly_repeat_cost_little(text: str) -> None:
    assert not is_repetitive(text)


# Text of a path


def decode_bytes(ids: list[int]) -> str:
    """Byte-level decoding as in GPT-2-like tokenizers: one token per byte, one U+FFFD per incomplete character."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_byte_fallback(ids: list[int]) -> str:
    """SentencePiece's byte fallback in `tokenizers`: a run of bytes that is no UTF-8 gives one U+FFFD per byte."""
    try:
        return bytes(ids).decode("utf-8")
    except UnicodeDecodeError as error:
        good = bytes(ids)[: error.start].decode("utf-8")
        return good + "\ufffd" * (len(ids) - error.start)


def grow(text: str, cuts: list[int], decode: Callable[[list[int]], str], tail_length: int) -> str:
    """Text after feeding the bytes of `text` in segments, with the last tokens of the *path* as tail."""
    ids = list(text.encode())
    grown, start = "", 0
    for end in [*cuts, len(ids)]:
        grown = extend_text(grown, ids[max(0, start - tail_length) : start], ids[start:end], decode)
        start = end
    return grown


def test_extended_text_of_the_first_segment_is_its_text() -> None:
    assert extend_text("", [], [104, 105], decode_bytes) == "hi"


@pytest.mark.parametrize("character", ["é", "€", "答", "😀"])
@pytest.mark.parametrize("decode", [decode_bytes, decode_byte_fallback])
def test_a_character_split_over_two_segments_comes_out_whole(
    character: str, decode: Callable[[list[int]], str]
) -> None:
    ids = list(f"ab{character}cd".encode())
    for cut in range(1, len(ids)):
        before = decode(ids[:cut])
        assert extend_text(before, ids[:cut][-8:], ids[cut:], decode) == f"ab{character}cd"


@given(st.text(alphabet="aé€😀", min_size=1, max_size=20), st.data())
def test_text_grown_in_segments_is_the_text_of_the_whole(text: str, data: st.DataObject) -> None:
    length = len(text.encode())
    cuts = sorted(data.draw(st.lists(st.integers(1, length), unique=True, max_size=6)))
    cuts = [cut for cut in cuts if cut < length]
    assert grow(text, cuts, decode_bytes, tail_length=8) == text


def test_a_replacement_character_that_the_model_wrote_stays() -> None:
    assert grow("a\ufffdb", [4], decode_bytes, tail_length=8) == "a\ufffdb"


def test_word_boundaries_of_the_tail_count() -> None:
    # SentencePiece strips the space in front of the first token of what it decodes.
    pieces = ["▁the", "▁answer", "▁is", "▁4", "2"]

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert extend_text("the answer", [0, 1], [2, 3], decode) == "the answer is 4"
    assert extend_text("the answer is 4", [2, 3], [4], decode) == "the answer is 42"


# Where a match ends in tokens


@pytest.mark.parametrize(("match_end", "kept"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (9, 3)])
def test_the_token_that_completes_the_match_is_kept(match_end: int, kept: int) -> None:
    # Tokens of three characters each: 4 characters need 2 tokens.
    assert tokens_until(match_end, [1, 2, 3], lambda ids: "abc" * len(ids)) == kept


def test_text_in_front_of_the_segment_counts_as_reached() -> None:
    # The path had 10 characters; the match ends one character into the segment.
    assert tokens_until(11, [1, 2, 3], lambda ids: "x" * 10 + "abc" * len(ids)) == 1


def test_tokens_without_text_are_not_kept_behind_the_match() -> None:
    # Tokens 0 are special and have no text.
    assert tokens_until(2, [1, 1, 0, 0], lambda ids: "a" * sum(ids)) == 2


@pytest.mark.parametrize("decode", [decode_bytes, decode_byte_fallback])
@pytest.mark.parametrize("text", ["x€", "x答", "x😀", "ab答案:7。 and on", "é😀"])
def test_kept_tokens_spell_the_match_out_when_it_ends_inside_a_multi_byte_character(
    text: str, decode: Callable[[list[int]], str]
) -> None:
    """An incomplete character has the length of a complete one, so length alone is no sign that the match is there."""
    ids = list(text.encode())
    for match_end in range(1, len(text) + 1):
        kept = tokens_until(match_end, ids, decode)
        assert kept == len(text[:match_end].encode())


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"\b", "one two", None),
        (r"(?=two)", "one two", None),
        (r"x*", "axx", 3),
        ("two", "one two", 7),
        ("z", "one", None),
    ],
)
def test_empty_matches_end_no_path(pattern: str, text: str, expected: int | None) -> None:
    assert find_match_end(re.compile(pattern), text) == expected
