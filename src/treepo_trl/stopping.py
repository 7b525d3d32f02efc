"""
When a path is finished: EOS, stop pattern, repetition, length. Pure functions over token ids and text.

Standard library only.
"""

import re
from collections.abc import Callable, Collection


MIN_REPEATED_CHARACTERS = 256
"""Length of a periodic tail below which it is no repetition: tables, rules and digits are shorter."""
MIN_REPEATS = 4
"""How often a tail must repeat to count."""
_PROBE_CHARACTERS = 32


def find_eos(token_ids: list[int], eos_token_ids: Collection[int]) -> int | None:
    """Index of the first EOS token of a segment, also when it is the very first token; `None` if there is none."""
    return next((i for i, token in enumerate(token_ids) if token in eos_token_ids), None)


def is_repetitive(text: str) -> bool:
    """
    Whether the text ends in a loop: a tail of at least 256 characters that repeats one unit at least 4 times.

    Looks at the text of the whole path, so loops across segments and with long periods are seen (the released code
    counts 32-character strings within one segment: 39 equal characters fire it, a 260-character loop does not).

    The unit's length is found through earlier occurrences of the last 32 characters, so ordinary text costs one
    substring search.
    """
    if len(text) < MIN_REPEATED_CHARACTERS:
        return False
    probe = text[-_PROBE_CHARACTERS:]
    start = len(text) - _PROBE_CHARACTERS
    while (start := text.rfind(probe, 0, start + _PROBE_CHARACTERS - 1)) >= 0:
        period = len(text) - _PROBE_CHARACTERS - start
        tail = max(MIN_REPEATED_CHARACTERS, MIN_REPEATS * period)
        if tail > len(text):
            return False  # earlier occurrences have longer periods still
        if text[-tail + period :] == text[-tail:-period]:
            return True
    return False


def extend_text(text: str, tail_ids: list[int], token_ids: list[int], decode: Callable[[list[int]], str]) -> str:
    """
    Text of a path after a segment, without decoding the whole path again.

    Args:
        text (`str`):
            Text of the path before the segment.
        tail_ids (`list[int]`):
            Last tokens of the path before the segment. They are decoded together with the segment, so that characters
            and word boundaries that span both come out right.
        token_ids (`list[int]`):
            Tokens of the segment.
        decode (`Callable[[list[int]], str]`):
            Text of a list of tokens.
    """
    tail = decode(tail_ids) if tail_ids else ""
    num_incomplete = len(tail) - len(tail.rstrip("\ufffd"))  # a character whose last bytes are in the segment
    joined = decode(tail_ids + token_ids)
    return text[: len(text) - num_incomplete] + joined[len(tail) - num_incomplete :]


def find_match_end(pattern: re.Pattern[str], text: str) -> int | None:
    """End of the first match that is not empty; `None` without one. Empty matches, as of `\\b`, say nothing."""
    return next((match.end() for match in pattern.finditer(text) if match.group()), None)


def tokens_until(match_end: int, token_ids: list[int], text_after: Callable[[list[int]], str]) -> int:
    """
    Smallest number of a segment's tokens with which the path's first `match_end` characters are those of the segment.

    This is where a path ends that the stop pattern stopped: the token that completes the match is kept, what was
    sampled after it is dropped. `text_after` gives the path's text for a prefix of the segment. Characters are
    compared, not counted: a character whose last bytes are missing already counts as one.
    """
    matched = text_after(token_ids)[:match_end]
    low, high = 1, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if text_after(token_ids[:middle])[:match_end] == matched:
            high = middle
        else:
            low = middle + 1
    return low
