"""Keys and values of rows and blocks: what is shared, kept, dropped and copied, and that no result depends on it."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.segments import EOS, GREEDY, PROMPTS, drain, generated
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SegmentRequest
from treepo_trl.engines.row_states import Block, BlockCache
from treepo_trl.engines.transformers import TransformersEngine


# Rows


def test_forks_reuse_the_prompt(model: PreTrainedModel) -> None:
    """Six requests for one prompt of 7 tokens prefill 6: the last token is fed with the first decoding step."""
    engine = TransformersEngine(model, [99])
    prompt = PROMPTS[1]
    results = drain(engine, [SegmentRequest(i, prompt, 4) for i in range(6)])
    assert engine.num_prefilled_tokens == 6
    children = [SegmentRequest(2 * i + j, prompt + results[i].token_ids, 4) for i in range(6) for j in range(2)]
    grandchildren = drain(engine, children)
    assert engine.num_prefilled_tokens == 6
    drain(
        engine,
        [
            SegmentRequest(r.request_id, children[r.request_id].token_ids + r.token_ids, 3)
            for r in grandchildren.values()
        ],
    )
    assert engine.num_prefilled_tokens == 6
    # From the middle of a segment the tokens behind the last boundary are computed, and no more.
    drain(engine, [SegmentRequest(0, prompt + results[0].token_ids[:2], 1)])
    before = engine.num_prefilled_tokens
    assert before <= 6 + 2
    drain(engine, [SegmentRequest(0, prompt, 2)])  # the prompt is kept for later requests
    assert engine.num_prefilled_tokens == before
    engine.reset_prefix_cache()
    drain(engine, [SegmentRequest(0, prompt, 2)])
    assert engine.num_prefilled_tokens == before + 6


def test_results_do_not_depend_on_other_rows(model: PreTrainedModel) -> None:
    alone = drain(TransformersEngine(model, [EOS], GREEDY), [SegmentRequest(0, PROMPTS[1], 9)])[0]
    engine = TransformersEngine(model, [EOS], GREEDY)
    # Others of all lengths, some done long before, and one that joins while it runs.
    engine.submit([SegmentRequest(10 + i, prompt, 1 + 3 * i) for i, prompt in enumerate(PROMPTS)])
    engine.submit([SegmentRequest(0, PROMPTS[1], 9)])
    results = {r.request_id: r for r in engine.collect()}
    engine.submit([SegmentRequest(50, [9, 9, 9, 9], 12)])
    while len(results) < 8:
        results.update({r.request_id: r for r in engine.collect()})
    assert results[0].token_ids == alone.token_ids
    assert results[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert results[50].token_ids == generated(model, [[9, 9, 9, 9]], 12)[0]


def test_a_long_request_joins_a_running_batch(model: PreTrainedModel) -> None:
    """The storage grows in both directions while rows are running."""
    engine = TransformersEngine(model, [EOS], GREEDY)
    engine.submit([SegmentRequest(0, [5], 2), SegmentRequest(1, [6, 7], 25)])
    results = {r.request_id: r for r in engine.collect()}
    long = [(3 * i) % 60 + 5 for i in range(100)]
    engine.submit([SegmentRequest(i, long[: 100 - i], 20) for i in range(2, 8)])
    while len(results) < 8:
        results.update({r.request_id: r for r in engine.collect()})
    expected = generated(model, [[5]], 2) + generated(model, [[6, 7]], 25)
    expected += generated(model, [long[: 100 - i] for i in range(2, 8)], 20)
    assert [results[i].token_ids for i in range(8)] == expected


# Blocks


def block_texts(cache: BlockCache) -> set[tuple[int, ...]]:
    """Token ids from the beginning up to the end of every block that is found from the root."""
    found, stack = set(), [((), cache.root)]
    while stack:
        before, block = stack.pop()
        for child in block.children:
            text = (*before, *child.token_ids)
            found.add(text)
            stack.append((text, child))
    return found


def keep(cache: BlockCache, *parts: list[int]) -> Block:
    block = cache.root
    for part in parts:
        block = cache.keep(block, part, torch.zeros(1, 2, 1, len(part), 1))
    return block


def test_the_least_recently_used_leaves_are_dropped_first() -> None:
    cache = BlockCache(max_tokens=12)
    keep(cache, [1, 1], [2, 2])
    keep(cache, [3, 3], [4, 4])
    cache.find([1, 1, 2, 2], 4)  # used again: 3-4 is the oldest now
    keep(cache, [5, 5], [6, 6])  # 12 tokens: all of them fit
    assert cache.num_tokens == 12
    keep(cache, [7])  # 13 are too many: down to 9, and 4-4, the leaf that was used longest ago, goes; then 3-3
    assert block_texts(cache) == {(1, 1), (1, 1, 2, 2), (5, 5), (5, 5, 6, 6), (7,)}
    assert cache.num_tokens == 9


def test_a_dropped_block_comes_back_with_its_child() -> None:
    cache = BlockCache(max_tokens=8)
    held = keep(cache, [1, 1], [2, 2])  # a request in flight holds this one
    keep(cache, [3] * 7)
    assert block_texts(cache) == set()  # 7 tokens are above three quarters of 8 too
    child = cache.keep(held, [9], torch.zeros(1, 2, 1, 1, 1))
    assert block_texts(cache) == {(1, 1), (1, 1, 2, 2), (1, 1, 2, 2, 9)}
    assert cache.num_tokens == 5
    assert cache.find([1, 1, 2, 2, 9, 4], 5) is child


def test_a_block_is_kept_once() -> None:
    cache = BlockCache(max_tokens=None)
    assert keep(cache, [1, 2]) is keep(cache, [1, 2])
    assert cache.num_tokens == 2
    cache.clear()
    assert block_texts(cache) == set()
    assert cache.num_tokens == 0


def test_a_request_from_before_a_reset_leaves_nothing_in_the_new_cache() -> None:
    cache = BlockCache(max_tokens=100)
    old = keep(cache, [1, 1], [2, 2])
    cache.clear()
    child = cache.keep(old, [3], torch.zeros(1, 2, 1, 1, 1))
    assert [block.token_ids for block in child.chain()] == [[3], [2, 2], [1, 1]]  # the request still has its states
    assert cache.num_tokens == 0
    assert block_texts(cache) == set()


def test_a_block_that_is_kept_again_counts_as_used() -> None:
    cache = BlockCache(max_tokens=8)
    keep(cache, [1] * 4)
    keep(cache, [2] * 4)
    keep(cache, [1] * 4)  # there already
    keep(cache, [3] * 2)  # 10 are too many: down to 6
    assert block_texts(cache) == {(1,) * 4, (3, 3)}


# Storage


def test_the_storage_never_has_more_tokens_than_the_batch_may(model: PreTrainedModel) -> None:
    """Many short rows, then few long ones: rows and length that were needed at different times do not multiply."""
    engine = TransformersEngine(model, [], max_batch_tokens=200)
    largest = []
    reserve = engine._reserve

    def recording_reserve(num_rows: int, length: int) -> torch.Tensor:
        storage = reserve(num_rows, length)
        largest.append(storage.size(2) * storage.size(4))
        return storage

    engine._reserve = recording_reserve
    drain(engine, [SegmentRequest(i, [5 + i], 3) for i in range(40)])
    drain(engine, [SegmentRequest(i, [5 + i] * 60, 3) for i in range(6)])
    drain(engine, [SegmentRequest(i, [5 + i] * 2, 3) for i in range(40)])
    assert max(largest) <= 200
    assert max(largest) > 100
    engine.reset_prefix_cache()
    assert engine._storage is None


def test_the_batch_and_its_prefill_keep_to_the_token_budget(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [], max_batch_tokens=100)
    shapes = []
    forward = engine._forward

    def recording_forward(rows: slice, input_ids: torch.Tensor, positions: torch.Tensor, logits: bool) -> Any:
        shapes.append((rows.stop, int(positions.max()) + 1))
        return forward(rows, input_ids, positions, logits)

    engine._forward = recording_forward
    results = drain(engine, [SegmentRequest(i, [5 + i] * (3 + i), 4) for i in range(20)])
    assert len(results) == 20
    assert all(rows * length <= 100 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) > 3


def test_what_finished_is_freed(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [EOS], max_batch_tokens=200, max_cached_tokens=150)
    config = TreeSamplingConfig(num_generations=4, max_completion_length=16, segment_length=4, stop_repetition=False)
    sampler = TreeSampler(engine, config, [EOS])
    trees = sampler.sample([[5 + i] * 10 for i in range(12)], seed=0)
    assert [len(tree.leaves) for tree in trees] == [4] * 12
    assert engine._rows == []
    assert engine._blocks.num_tokens <= 150
    # Old trees first: what a tree needs is still there when its children ask for it, far less is computed than asked.
    assert engine.num_cached_tokens > 0.5 * engine.num_prompt_tokens
