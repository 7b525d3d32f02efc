"""How a path ends: EOS, the stop pattern and repetition, wherever segments are cut."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.fakes import EOS, FakeEngine, ScriptedEngine, endless, memoryless
from tests.support.sampling import (
    completions,
    decode_byte_fallback,
    decode_bytes,
    decode_words,
    make_config,
    prompts_of,
    reasons,
    tree_of,
)
from treepo_trl.engines import SegmentRequest
from treepo_trl.sampling.sampler import TreeSampler
from treepo_trl.sampling.stopping import is_repetitive


def test_every_eos_of_a_list_ends_a_path_and_what_follows_is_cut() -> None:
    engine = ScriptedEngine([[5, 9, 7], [5, EOS, 9], [5, 6, 9], [9]])
    config = make_config(4, branching_factor=1)
    (tree,) = TreeSampler(engine, config, [EOS, 9]).sample([[7]], seed=0)
    assert completions(tree) == [[5, 9], [5, EOS], [5, 6, 9], [9]]
    assert [tree.logprobs(leaf) for leaf in tree.leaves] == [[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0, -3.0], [-1.0]]
    assert set(reasons(tree)) == {"stop"}


# The stop pattern


PATTERN = {"branching_factor": 1, "stop_pattern": "<7><8>", "decode": decode_words}


def test_a_pattern_across_a_segment_boundary_ends_the_path_where_it_ended() -> None:
    engine = ScriptedEngine([[1, 2, 7], [1, 2, 3], [8, 4, 5], [4, 7, 8], [9, EOS], [9, EOS]])
    tree = tree_of(engine, 2, **PATTERN)
    assert completions(tree) == [[1, 2, 7, 8], [1, 2, 3, 4, 7, 8]]
    assert reasons(tree) == ["pattern", "pattern"]
    assert tree.logprobs(tree.leaves[0]) == [-1.0, -2.0, -3.0, -1.0]
    assert tree.num_unique_tokens == 10  # the two tokens behind the first match are not kept


@pytest.mark.parametrize(
    ("answers", "changes", "expected"),
    [
        # A match that begins in the prompt is none.
        ([[8, 1, EOS], [1, EOS]], {"prompt": (7, 8, 7)}, [([8, 1, EOS], "stop"), ([1, EOS], "stop")]),
        # EOS directly behind a match is an ordinary stop; what goes on behind it is cut.
        ([[7, 8, EOS], [7, 8, 1, EOS]], {"segment_length": 4}, [([7, 8, EOS], "stop"), ([7, 8], "pattern")]),
        # Text behind EOS cannot match.
        ([[1, EOS, 7, 8], [7, EOS, 8]], {"segment_length": 4}, [([1, EOS], "stop"), ([7, EOS], "stop")]),
        # A pattern exactly at the cap is a pattern.
        (
            [[1, 7], [1, 7], [8, 8], [2, 3]],
            {"segment_length": 2, "max_completion_length": 4},
            [([1, 7, 8], "pattern"), ([1, 7, 2, 3], "length")],
        ),
    ],
    ids=["prompt", "eos behind it", "behind eos", "at the cap"],
)
def test_what_a_pattern_ends(answers: list[list[int]], changes: dict[str, Any], expected: list[Any]) -> None:
    tree = tree_of(ScriptedEngine(answers), 2, **changes, **PATTERN)
    assert list(zip(completions(tree), reasons(tree), strict=True)) == expected


@pytest.mark.parametrize("fallback", ["random", "low_prob", "root"])
@pytest.mark.parametrize("segment_length", [1, 2, 5, 9, 20])
def test_text_rules_see_the_text_of_the_whole_path_after_branching_and_fallback(
    fallback: str, segment_length: int
) -> None:
    """Four tokens that may occur anywhere: a path ends with the first <1><2>, never later and never without."""
    changes = {"segment_length": segment_length, "fallback_policy": fallback, "stop_pattern": "<1><2>"}
    config = make_config(12, max_completion_length=40, **changes)
    sampler = TreeSampler(FakeEngine(memoryless(0.02, vocabulary=4)), config, [EOS], decode_words)
    for tree in sampler.sample(prompts_of(4), seed=0):
        assert len(tree.leaves) == 12
        for leaf in tree.leaves:
            completion, reason = tree.completion_ids(leaf), tree.nodes[leaf].finish_reason
            matches = [i for i in range(1, len(completion)) if completion[i - 1 : i + 1] == [1, 2]]
            if reason == "stop" and matches:  # an EOS directly behind the match
                assert matches == [len(completion) - 2]
            else:
                assert matches == ([len(completion) - 1] if reason == "pattern" else [])


def paths_of(
    text: str, segment_length: int, pattern: str, decode: Callable[[list[int]], str] = decode_bytes
) -> list[tuple[str | None, bytes]]:
    """Reason and bytes of two paths of an engine that writes `text`, one token per byte."""
    ids = [*text.encode(), EOS]
    changes = {"segment_length": segment_length, "max_completion_length": 100, "stop_pattern": pattern}
    tree = tree_of(FakeEngine(lambda path, rng: ids[len(path) - 1]), 2, branching_factor=1, decode=decode, **changes)
    return list(zip(reasons(tree), map(bytes, completions(tree)), strict=True))


@pytest.mark.parametrize(
    ("pattern", "end", "segment_lengths"),
    [
        ("😀 the 答案:7", "x😀 the 答案:7", (1, 2, 3, 4, 5, 7, 100)),
        # A pattern that ends with a character of several bytes keeps all of them.
        ("7。", "x😀 the 答案:7。", (4, 5, 7, 100)),
        ("答.*。", "x😀 the 答案:7。", (4, 5, 7, 100)),
    ],
)
def test_multi_byte_text_matches_wherever_segments_are_cut(
    pattern: str, end: str, segment_lengths: tuple[int, ...]
) -> None:
    for segment_length in segment_lengths:
        paths = paths_of("x😀 the 答案:7。 and on", segment_length, pattern)
        assert paths == [("pattern", end.encode())] * 2, segment_length


@pytest.mark.parametrize("segment_length", [1, 2, 3, 5, 6, 9, 17])
def test_long_runs_of_bytes_come_out_whole_with_byte_fallback(segment_length: int) -> None:
    text = "a 😀😀😀😀😀😀 b 答案是七。 and so on and so forth"
    paths = paths_of(text, segment_length, "是七", decode_byte_fallback)
    match = text[: text.index("。")].encode()
    # A segment that ends inside "。" hides the match until the next one has arrived.
    is_hidden = len(match) % segment_length != 0 and any((len(match) + i) % segment_length == 0 for i in (1, 2))
    assert paths == [("pattern", match + "。".encode() * is_hidden)] * 2


@pytest.mark.timeout(60)  # Python's `re` would take years
def test_a_pattern_that_backtracks_for_ever_ends_in_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a" * 40
    assert paths_of(text, 50, "(a+)+b") == [("stop", text.encode() + bytes([EOS]))] * 2
    monkeypatch.setattr("treepo_trl.sampling.stopping._MATCH_SECONDS", 0.2)
    with pytest.raises(
        ValueError, match=r"`stop_pattern` is '\(a\|aa\)\+c\$'.* 43 characters .* 0\.2 seconds"
    ) as error:
        paths_of(text + "c b", 50, "(a|aa)+c$")
    assert error.value.__notes__  # which name the prompt


# Repetition


@pytest.mark.parametrize(("stop_repetition", "reason", "end"), [(True, "repetition", 352), (False, "length", 400)])
def test_a_loop_across_segments_ends_the_path_unless_the_rule_is_off(
    stop_repetition: bool, reason: str, end: int
) -> None:
    # Two tokens <1><2> are 6 characters. 1024 characters are reached with 342 tokens, so the 22nd segment of 16 tokens
    # (352) ends the path.
    engine = FakeEngine(lambda path, rng: 1 + len(path) % 2)
    changes = {"segment_length": 16, "max_completion_length": 400, "stop_repetition": stop_repetition}
    tree = tree_of(engine, 2, branching_factor=1, decode=decode_words, **changes)
    assert reasons(tree) == [reason] * 2
    assert [tree.nodes[leaf].end for leaf in tree.leaves] == [end] * 2


def test_a_loop_that_ends_with_eos_is_a_stop() -> None:
    engine = FakeEngine(lambda path, rng: EOS if len(path) == 350 else 1 + len(path) % 2)
    changes = {"segment_length": 400, "max_completion_length": 400, "stop_repetition": True}

    def decode(ids: list[int]) -> str:
        return decode_words([token for token in ids if token != EOS])  # which is special and has no text

    assert is_repetitive(decode(engine.answer(SegmentRequest(0, [7], 400)).token_ids))
    assert reasons(tree_of(engine, 2, branching_factor=1, decode=decode, **changes)) == ["stop"] * 2


@pytest.mark.parametrize("rule", [{"stop_pattern": "x"}, {"stop_repetition": True}])
def test_a_text_rule_without_decode_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pass `decode`"):
        TreeSampler(FakeEngine(endless), make_config(**rule), [EOS])
