"""
When a path is finished: EOS, stop pattern, repetition, length. Pure functions over token ids and text.

The standard library, and `regex` for what it lacks: a time limit.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Set
from functools import cache
from typing import Protocol, cast

import regex  # pyright: ignore[reportMissingTypeStubs]


MIN_REPEATED_CHARACTERS = 1024
"""Length of a periodic tail below which it is no repetition: zero matrices, tables, boards and digits are shorter."""
MIN_REPEATS = 4
"""How often a tail must repeat to count; at least 3, or the search in `is_repetitive` misses loops."""

_MATCH_SECONDS = 2.0  # for one search; an ordinary pattern takes milliseconds in a hundred thousand characters
_TAIL_LENGTH = 8  # tokens decoded again in front of a segment: more than any character or merge spans


class TextTokenizer(Protocol):
    """What `text_decoder` needs of a tokenizer: every tokenizer of transformers has it."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str | list[str]: ...


def text_decoder(tokenizer: TextTokenizer) -> Callable[[list[int]], str]:
    """
    The text of a list of tokens, without special tokens, as the rules of a [`TreeSampler`] read it.

    Spaces are not cleaned up: that would remove characters which earlier segments have shown already.
    """

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


def find_eos(token_ids: list[int], eos_token_ids: Set[int]) -> int | None:
    """Index of the first EOS token of a segment, also when it is the very first token; `None` if there is none."""
    if eos_token_ids.isdisjoint(token_ids):  # the usual case, without a loop in Python
        return None
    return min(token_ids.index(token) for token in eos_token_ids if token in token_ids)


def is_repetitive(text: str) -> bool:
    """
    Whether the text ends in a loop: a tail of at least 1024 characters that repeats one unit at least 4 times.

    Looks at the text of the whole path, so loops across segments and with long periods are seen (the released code
    counts 32-character strings within one segment: a row of 40 equal characters fires it, a 260-character loop does
    not). A unit must repeat exactly: a loop that counts ("Step 101", "Step 102") is none. A character at the end whose
    last bytes are missing is left out.

    Exact and in linear time. Read from its end, a text with a loop of period `p` repeats its first `m` characters at a
    distance of `p`. Let `q <= m` be the smallest such distance. If `p <= m`, the first `m + q` characters have both
    periods, hence their greatest common divisor too (theorem of Fine and Wilf); that is `q`, which divides `p`, so the
    loop has period `q`. One candidate per `m` is therefore enough. `m` doubles, each search starts where the last one
    ended, and `str.find` is linear for long strings (`str.rfind` is not). Text without a long repeated tail costs one
    search in a quarter of it.
    """
    if text.endswith("\ufffd"):
        text = text[:-3] + text[-3:].rstrip("\ufffd")  # up to three of four bytes may be there
    if len(text) < MIN_REPEATED_CHARACTERS:
        return False
    longest_period = len(text) // MIN_REPEATS
    backwards = text[::-1]
    probe_length = MIN_REPEATED_CHARACTERS // MIN_REPEATS
    start = 1
    while (period := backwards.find(backwards[:probe_length], start, longest_period + probe_length)) > 0:
        if period <= probe_length:
            tail = max(MIN_REPEATED_CHARACTERS, MIN_REPEATS * period)
            if backwards[period:tail] == backwards[: tail - period]:
                return True
        start = max(period, probe_length + 1)  # no loop has a shorter period
        probe_length *= 2
    return False


def matching_tail(text: str, tail_of: Callable[[int], list[int]], decode: Callable[[list[int]], str]) -> list[int]:
    """
    Last tokens of a path that can be decoded without the others: their text is how the path's text ends.

    A few are enough, unless they begin inside a character or the tokenizer's text of a run of bytes depends on the
    whole run; then more are taken, all of them in the end.

    Args:
        text (`str`):
            Text of the path.
        tail_of (`Callable[[int], list[int]]`):
            The last so many tokens of the path, fewer where it is shorter.
        decode (`Callable[[list[int]], str]`):
            Text of a list of tokens.
    """
    length = _TAIL_LENGTH
    while len(tail_ids := tail_of(length)) == length:
        tail = decode(tail_ids)
        if text.endswith(tail) and not tail.startswith("\ufffd"):
            break
        length *= 2
    return tail_ids


def text_change(
    text: str, tail_ids: list[int], token_ids: list[int], decode: Callable[[list[int]], str]
) -> tuple[int, str]:
    """
    How a segment changes its path's text, without decoding the whole path again.

    Args:
        text (`str`):
            Text of the path before the segment.
        tail_ids (`list[int]`):
            Last tokens of the path before the segment, from `matching_tail`. They are decoded together with the
            segment, so that characters and word boundaries that span both come out right.
        token_ids (`list[int]`):
            Tokens of the segment.
        decode (`Callable[[list[int]], str]`):
            Text of a list of tokens.

    Returns:
        `tuple[int, str]`: characters to drop from the end of the path's text, since their last bytes are in the
        segment, and the characters to add.
    """
    tail = decode(tail_ids) if tail_ids else ""
    if not text.endswith(tail):  # these are all tokens of the path
        return len(text), decode(tail_ids + token_ids)
    num_incomplete = len(tail) - len(tail.rstrip("\ufffd"))
    return num_incomplete, decode(tail_ids + token_ids)[len(tail) - num_incomplete :]


def join_text(changes: Iterable[tuple[int, str]]) -> str:
    """Text of a path from what its segments dropped and added, root side first."""
    pieces: list[str] = []
    for num_dropped, added in changes:
        while num_dropped and pieces:
            last = pieces.pop()
            kept = last[: max(len(last) - num_dropped, 0)]
            num_dropped -= len(last) - len(kept)
            if kept:
                pieces.append(kept)
        pieces.append(added)
    return "".join(pieces)


def find_match_end(pattern: str, text: str) -> int | None:
    r"""
    End of the first match that is not empty; `None` without one. Matches such as that of `\b` are empty.

    Raises:
        ValueError: if the search takes longer than two seconds, as some patterns need exponentially many steps.
    """
    try:
        return next((match.end() for match in _matches(pattern)(text, timeout=_MATCH_SECONDS) if match.group()), None)
    except TimeoutError as error:
        raise ValueError(
            f"`stop_pattern` is {pattern!r}, and to look for it in a completion of {len(text)} characters took more "
            f"than {_MATCH_SECONDS:g} seconds. Repetitions of what repeats or overlaps, such as `(a+)+` or `(a|aa)+`, "
            "can match a text in exponentially many ways. Write it without them."
        ) from error


class _Finditer(Protocol):
    def __call__(self, text: str, *, timeout: float) -> Iterator[re.Match[str]]: ...


@cache
def _matches(pattern: str) -> _Finditer:
    """The matches of a Python pattern in a text, within a time limit."""
    # A brace that counts nothing is a character to `re`, and may allow inexact matches to `regex`.
    name_or_escape, brace = r"\\N\{[^}]*\}|\\.", r"\{(?!\d+(,\d*)?\}|,\d*\})"
    as_in_re = re.sub(f"({name_or_escape})|{brace}", lambda match: match[1] or r"\{", pattern, flags=re.DOTALL)
    return cast(_Finditer, regex.compile(as_in_re).finditer)


def tokens_until(match_end: int, token_ids: list[int], text_after: Callable[[list[int]], str]) -> int:
    """
    Smallest number of a segment's tokens with which the path's first `match_end` characters are those of the segment.

    This is where a path ends that the stop pattern stopped: the token that completes the match is kept, what was
    sampled after it is dropped. `text_after` gives the path's text for a prefix of the segment. Characters are
    compared, not counted: a character whose last bytes are missing already counts as one.
    """
    matched = text_after(token_ids)[:match_end]
    kept = len(token_ids)
    while True:
        low = 1
        while low < kept:
            middle = (low + kept) // 2
            if text_after(token_ids[:middle])[:match_end] == matched:
                kept = middle
            else:
                low = middle + 1
        # With byte fallback an incomplete character makes the whole characters in front of it unreadable too. A prefix
        # that ends before such characters may hold the match already.
        shorter = kept - 1
        while shorter and text_after(token_ids[:shorter]).endswith("\ufffd"):
            shorter -= 1
        if not shorter or text_after(token_ids[:shorter])[:match_end] != matched:
            return kept
        kept = shorter
