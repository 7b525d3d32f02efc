"""When a path ends: EOS, the stop pattern, and the text of a path that grows segment by segment."""

import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.sampling import decode_byte_fallback, decode_bytes
from treepo_trl.sampling.stopping import find_eos, find_match_end, join_text, matching_tail, text_change, tokens_until


# EOS


@pytest.mark.parametrize(
    ("token_ids", "eos_token_ids", "position"),
    [
        ([5, 6, 0], [0], 2),
        ([0, 5, 6], [0], 0),  # the very first token (the released code never looks at it)
        ([0], [0], 0),
        ([5, 2, 0], [0, 2], 1),  # several EOS tokens, as in instruct models: the first that occurs
        ([5, 0, 0], [0], 1),
        ([5, 6], [0], None),
        ([], [0], None),
        ([5, 0], [], None),
    ],
)
def test_first_eos(token_ids: list[int], eos_token_ids: list[int], position: int | None) -> None:
    assert find_eos(token_ids, frozenset(eos_token_ids)) == position


# Text of a path


def grow(text: str, cuts: list[int], decode: Callable[[list[int]], str]) -> str:
    """Text after feeding the bytes of `text` in segments."""
    ids = list(text.encode())
    changes, start = [], 0
    for end in [*cuts, len(ids)]:
        before = join_text(changes)
        tail = matching_tail(before, lambda length, start=start: ids[max(0, start - length) : start], decode)
        changes.append(text_change(before, tail, ids[start:end], decode))
        start = end
    return join_text(changes)


@given(st.text(alphabet="aé€😀\ufffd", min_size=1, max_size=20), st.data())
def test_text_grown_in_segments_is_the_text_of_the_whole(text: str, data: st.DataObject) -> None:
    decode = data.draw(st.sampled_from([decode_bytes, decode_byte_fallback]))
    length = len(text.encode())
    cuts = sorted(data.draw(st.lists(st.integers(1, length), unique=True, max_size=6)))
    cuts = [cut for cut in cuts if cut < length]
    assert grow(text, cuts, decode) == text


def test_word_boundaries_of_the_tail_count() -> None:
    # SentencePiece strips the space in front of the first token of what it decodes.
    pieces = ["▁the", "▁answer", "▁is", "▁4", "2"]

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    for text, tail_ids, token_ids, whole in (("the answer", [0, 1], [2, 3], "the answer is 4"), ("4", [3], [4], "42")):
        assert join_text([(0, text), text_change(text, tail_ids, token_ids, decode)]) == whole


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
@pytest.mark.parametrize("text", ["x€", "x答", "x😀", "ab答案:7。 and on", "é😀", "答案是七。", "a 答é b😀答 c"])
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
    assert find_match_end(pattern, text) == expected


PIECES = [
    *r"ab{}()[]|.*+?^$ 1,e<=",
    r"\{",
    r"\b",
    r"\w",
    r"\boxed",
    "[^}]*",
    "{2}",
    "{1,}",
    "{,2}",
    "{e}",
    "{i<=1}",
    "(?:",
]
PIECES += [r"\N{DIGIT ONE}", "(?i)", "(?=", "[a--b]", "[a&&b]"]
TEXTS = ["aab{e}b", r"x\boxed{a}1", "a{2}b{,}", "AAe<=1 ", "a{i<=1}{}"]


@pytest.mark.filterwarnings("ignore:Possible")
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join))
@settings(max_examples=400)
@example("a{e}")
@example(r"\boxed{e<=1}")
def test_patterns_mean_what_they_mean_in_python(pattern: str) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error:
        return
    for text in TEXTS:
        expected = next((match.end() for match in compiled.finditer(text) if match.group()), None)
        assert find_match_end(pattern, text) == expected


def test_a_search_has_the_seconds_that_its_error_names(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def search(text: str, *, timeout: float) -> Iterator[re.Match[str]]:
        given.append(timeout)
        raise TimeoutError

    monkeypatch.setattr("treepo_trl.sampling.stopping._matches", lambda pattern: search)
    with pytest.raises(ValueError, match="of 3 characters took more than 2 seconds"):
        find_match_end("a", "aaa")
    assert given == [2.0]
