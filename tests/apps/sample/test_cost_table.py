"""Reports against hand counts, and ordinary sampling over the fake engine."""

import random
from typing import Any

import pytest

from tests.support.fakes import EOS, FakeEngine, endless, memoryless
from treepo_trl.apps.sample.cost_table import RolloutReport, format_table, report, sample_independent
from treepo_trl.engines import SegmentRequest
from treepo_trl.sampling.config import TreeSamplingConfig
from treepo_trl.sampling.sampler import SamplingStats
from treepo_trl.sampling.tree import SegmentTree


# Reports


def forked_tree() -> SegmentTree:
    """3 tokens, then leaves of 2 and of 4 more, and beside them one of 1: 10 unique, 5 + 7 + 1 in leaves."""
    tree = SegmentTree([1, 2])
    stem = tree.add(None, [5, 6, 7])
    tree.add(stem, [8, EOS], finish_reason="stop")
    tree.add(stem, [8, 9, 8, 9], finish_reason="repetition")
    tree.add(None, [EOS], finish_reason="stop")
    return tree


def test_report_counts_by_hand() -> None:
    other = SegmentTree([3])
    other.add(None, [5, 5, 5, 5], finish_reason="length")  # 4 tokens
    stats = SamplingStats(num_decoded_tokens=16, num_prompt_tokens=40, num_cached_tokens=30, seconds=0.5)
    result = report([forked_tree(), other], stats)
    assert result == RolloutReport(
        prompts=2,
        leaves=4,
        finish_reasons={"stop": 2, "repetition": 1, "length": 1},
        decoded_tokens=16,
        unique_tokens=14,
        leaf_tokens=17,
        prompt_tokens=40,
        cached_tokens=30,
        seconds=0.5,
    )
    assert result.leaves_per_second == 8
    assert result.decoded_tokens_per_second == 32
    assert result.decoded_tokens_per_leaf == 4


def test_report_of_no_trees() -> None:
    result = report([], SamplingStats(seconds=0.5))
    assert (result.prompts, result.leaves, result.finish_reasons, result.decoded_tokens_per_leaf) == (0, 0, {}, 0)


def make_report(**changes: Any) -> RolloutReport:
    counts = {"prompts": 2, "leaves": 8, "finish_reasons": {"stop": 6, "length": 2}, "prompt_tokens": 400}
    counts |= {"decoded_tokens": 1200, "unique_tokens": 1000, "leaf_tokens": 1600, "cached_tokens": 0, "seconds": 2.0}
    return RolloutReport(**{**counts, **changes})


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_table_of_two_ways_has_medians_and_their_ratio() -> None:
    """Seconds 1, 9, 2 have the median 2 and 8, 3, 5 the median 5; means would be 4 and 5.33."""
    trees = [make_report(seconds=seconds, decoded_tokens=900) for seconds in (1.0, 9.0, 2.0)]
    others = [make_report(seconds=seconds, leaves=9, finish_reasons={}) for seconds in (8.0, 3.0, 5.0)]
    rows = cells(format_table({"trees": trees, "independent": others}))
    assert rows[""] == ["trees", "independent", "trees / independent"]
    assert rows["seconds"] == ["2", "5", "0.400"]
    assert rows["decoded tokens"] == ["900", "1,200", "0.750"]
    assert rows["trajectories / s"] == ["4", "1.8", "2.222"]  # 8 / 2 and 9 / 5
    assert rows["decoded tokens / s"] == ["450", "240", "1.875"]
    assert rows["ended by stop"] == ["6", "0", "-"]
    assert rows["ended by pattern"] == ["0", "0", "-"]


def test_a_table_of_one_way_is_markdown_and_small_numbers_keep_their_digits() -> None:
    table = format_table({"trees": [make_report(seconds=0.0123456)]})
    assert len({len(line) for line in table.splitlines()}) == 1
    rows = cells(table)
    assert (rows[""], rows["trajectories (leaves)"], rows["ended by length"]) == (["trees"], ["8"], ["2"])
    assert (rows["decoded tokens / trajectory"], rows["of these cached"]) == (["150"], ["0"])
    assert rows["seconds"] == ["0.01235"]


# Ordinary sampling


class CountingEngine(FakeEngine):
    """Keeps the size of each submission, has served tokens before, and finds half of a prompt in its cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_prompt_tokens, self.num_cached_tokens = 1000, 500
        self.submitted: list[int] = []

    def submit(self, requests: list[SegmentRequest]) -> None:
        super().submit(requests)
        self.submitted.append(len(requests))
        self.num_cached_tokens += sum(len(request.token_ids) // 2 for request in requests)


def config(**changes: Any) -> TreeSamplingConfig:
    return TreeSamplingConfig(**{"num_generations": 5, "max_completion_length": 12, **changes})


def test_each_completion_is_one_request_and_all_are_submitted_at_once() -> None:
    engine = CountingEngine(memoryless(0.2), arrival=random.Random(0))
    prompts = [[1, 2], [3], [4, 5, 6, 7]]
    counts: list[int] = []
    trees, stats = sample_independent(engine, prompts, config(), counts.append)
    assert engine.submitted == [15]
    assert len({request.request_id for request in engine.requests}) == 15
    assert {request.max_tokens for request in engine.requests} == {12}
    assert [request.token_ids for request in engine.requests] == [prompt for prompt in prompts for _ in range(5)]
    assert sum(counts) == 15
    assert len(counts) > 1  # results came in several parts
    prompt_of = {request.request_id: request.token_ids for request in engine.requests}
    for tree, prompt in zip(trees, prompts, strict=True):
        assert tree.prompt_ids == prompt
        assert tree.root_children == tree.leaves == [0, 1, 2, 3, 4]
        answers = [result for result in engine.results if prompt_of[result.request_id] == prompt]
        assert [(list(n.token_ids), list(n.logprobs or ()), n.finish_reason) for n in tree.nodes] == [
            (answer.token_ids, answer.logprobs, answer.finish_reason) for answer in answers
        ]
    assert stats.num_segments == 15
    assert stats.num_decoded_tokens == sum(len(result.token_ids) for result in engine.results)
    assert stats.num_decoded_tokens == sum(tree.num_leaf_tokens for tree in trees)
    assert stats.num_prompt_tokens == 5 * (2 + 1 + 4)
    assert stats.num_cached_tokens == 5 * (1 + 0 + 2)
    assert stats.seconds == stats.engine_seconds > 0
    assert stats.num_fallback_leaves == 0
    assert engine.aborted == 0


def test_a_completion_ends_at_the_engines_context() -> None:
    """Prompts of 2 and 6 tokens in a context of 10 leave 8 and 4 of the 12 tokens."""
    engine = FakeEngine(endless, context_length=10)
    trees, _ = sample_independent(engine, [[1] * 2, [1] * 6], config())
    assert [{node.end for node in tree.nodes} for tree in trees] == [{8}, {4}]


def test_an_error_of_the_callback_aborts_what_is_in_flight() -> None:
    engine = FakeEngine(memoryless(0.2), arrival=random.Random(1))

    def fail(count: int) -> None:
        raise RuntimeError("bar")

    with pytest.raises(RuntimeError, match="bar"):
        sample_independent(engine, [[1], [2], [3]], config(), fail)
    assert engine.aborted == 1
