"""What is in flight: an engine's slots, its cache and its blocks, and what is reported meanwhile."""

import random
from collections import Counter

import pytest

from tests.support.fakes import EOS, FakeEngine, RecordingEngine, endless, memoryless
from tests.support.sampling import make_config, prompts_of, trees_of
from treepo_trl.engines import SegmentRequest
from treepo_trl.sampling.sampler import TreeSampler
from treepo_trl.sampling.tree import SegmentTree


def test_slots_stay_full_while_there_is_work() -> None:
    """Whenever the sampler waits, every slot is taken or everything that can run does."""
    engine = RecordingEngine(memoryless(0.05), arrival=random.Random(0), slots=20)
    trees_of(engine, make_config(8, max_completion_length=30), 60)
    running, started, owner = 0, set[int](), engine.owners
    for i, (kind, items) in enumerate(engine.events):
        if kind == "submit":
            running += len(items)
            started |= {owner[request.request_id] for request in items}
            # With a prompt that was not started there is always something to run.
            if len(started) < 60:
                assert running == 20
        else:
            running -= len(items)
            if len(started) < 60:
                assert engine.events[i + 1][0] == "submit", "a free slot was left empty"
        assert running <= 20
    assert started == {100 + i for i in range(60)}


def test_old_trees_go_first() -> None:
    # One slot: a tree is started only when all older ones are done.
    engine = RecordingEngine(memoryless(0.1), slots=1)
    trees_of(engine, make_config(6), 5)
    owners = list(engine.owners.values())
    assert owners == sorted(owners)
    # Several slots: of the segments that are ready, the oldest tree's are submitted first. A tree that waits for a
    # segment lets a younger one use the slot.
    engine = RecordingEngine(memoryless(0.1), slots=4, arrival=random.Random(3))
    trees_of(engine, make_config(6), 30)
    owners = list(engine.owners.values())
    first = [owners.index(100 + k) for k in range(30)]
    last = [len(owners) - 1 - owners[::-1].index(100 + k) for k in range(30)]
    assert first == sorted(first)
    # At most four trees are under way at any time, as many as there are slots.
    assert all(sum(first[k] <= i <= last[k] for k in range(30)) <= 5 for i in range(len(engine.requests)))


@pytest.mark.parametrize("slots", [None, 5, 40])
def test_segments_are_submitted_only_for_the_oldest_trees_that_the_engines_cache_holds(slots: int | None) -> None:
    """Law: with every request, its tree and all older unfinished ones fit, or it is the oldest one."""
    capacity = 90
    engine = RecordingEngine(memoryless(0.05), num_cache_tokens=capacity, arrival=random.Random(0), slots=slots)
    trees_of(engine, make_config(4), 12)
    owner = engine.owners
    left = Counter(owner.values())
    stored, level, most = Counter[int](), Counter[int](), 0
    for kind, items in engine.events:
        if kind == "collect":
            for result in items:
                name = owner[result.request_id]
                left[name] -= 1
                stored[name] += len(result.token_ids)
                level[name] -= 1
            continue
        level.update(owner[request.request_id] for request in items)
        unfinished = sorted(name for name in left if left[name] > 0 and (stored[name] or level[name]))
        for name in {owner[request.request_id] for request in items} - {unfinished[0]}:
            # A level may have more segments than are in flight: this is the least that these trees hold.
            assert sum(3 + stored[each] + 3 * level[each] for each in unfinished if each <= name) <= capacity
        most = max(most, len(unfinished))
    assert len(left) == 12
    assert 2 <= most < 12


def test_as_many_trees_are_started_as_the_engines_cache_holds() -> None:
    # Every tree has 3 prompt tokens and two first segments of 3: 9. Six of them fit into 60.
    engine = RecordingEngine(endless, num_cache_tokens=60)
    trees_of(engine, make_config(4), 9)
    assert engine.events[0][0] == "submit"
    assert len(engine.events[0][1]) == 6 * 2
    # A tree that is not started may draw its largest first level: 3 + 4 * 3 = 15, so two of them fit into 30.
    engine = RecordingEngine(endless, num_cache_tokens=30)
    trees_of(engine, make_config(4, initial_branching_factor=[1, 4]), 9)
    assert {request.token_ids[0] for request in engine.events[0][1]} == {100, 101}


def test_one_long_prompt_does_not_take_the_slots_of_the_others_once_it_is_done() -> None:
    class Engine(RecordingEngine):
        """Room for 400 tokens: rows times the longest of them."""

        def num_slots(self, length: int) -> int | None:
            return 400 // max(length, 1)

    engine = Engine(endless)
    prompts = [[99] * 150, *prompts_of(30)]
    trees_of(engine, make_config(4), prompts)
    running, most = Counter[int](), 0
    for kind, items in engine.events:
        for item in items:
            length = len(next(r for r in engine.requests if r.request_id == item.request_id).token_ids)
            running[length] += 1 if kind == "submit" else -1
        if kind == "submit" and not any(count for length, count in running.items() if length >= 150):
            most = max(most, sum(running.values()))
    assert most > 20  # up to 400 // 15 of the short ones


def test_the_oldest_tree_runs_even_if_it_does_not_fit() -> None:
    engine = RecordingEngine(endless, num_cache_tokens=1)
    trees = trees_of(engine, make_config(4), 3)
    assert [len(tree.leaves) for tree in trees] == [4, 4, 4]
    owners = list(engine.owners.values())
    assert owners == sorted(owners)  # one after the other


def test_an_engine_is_asked_for_its_slots_at_the_longest_sequence() -> None:
    asked = []

    class Engine(FakeEngine):
        def num_slots(self, length: int) -> int | None:
            asked.append(length)
            # Whatever runs has a slot, and nothing is longer than that.
            running = [len(request.token_ids) + request.max_tokens for request in self._pending]
            assert length >= max(running, default=0)
            return 2

    trees_of(Engine(endless, arrival=random.Random(0)), make_config(2), 2)
    assert max(asked) == 3 + 12
    assert asked[-1] == 0  # nothing runs any more


@pytest.mark.parametrize("prompt_length", [1, 3, 16, 17, 30])
def test_segments_end_where_the_engines_cache_goes_on(prompt_length: int) -> None:
    """Blocks of 4 tokens, segments of at most 10: with 4 k + 1 tokens all but the last one are in full blocks."""
    engine = FakeEngine(endless, block_size=4)
    config = make_config(8, segment_length=10, max_completion_length=50)
    (tree,) = trees_of(engine, config, [[9] * prompt_length])
    for request in engine.requests:
        if len(request.token_ids) > prompt_length:
            assert len(request.token_ids) % 4 == 1
        # Shorter by less than a block, except at the cap.
        assert 7 <= request.max_tokens <= 10 or len(request.token_ids) + request.max_tokens == prompt_length + 50
    assert {tree.nodes[leaf].end for leaf in tree.leaves} == {50}


def test_short_segments_are_not_cut_to_fit_large_blocks() -> None:
    # Prompt 3, segments of 3, blocks of 16: an end at 1 mod 16 is too far back, except in front of 17 = 3 + 14.
    engine = FakeEngine(endless, block_size=16)
    config = make_config(2, segment_length=3, max_completion_length=24, initial_branching_factor=[2, 2])
    trees_of(engine, config, [[9] * 3])
    # 3, 6, 9, 12, 15, then 18 is one behind 17: cut to 2 tokens; 20, 23, 26, and the cap at 27.
    assert sorted({len(request.token_ids) for request in engine.requests}) == [3, 6, 9, 12, 15, 17, 20, 23, 26]


def test_a_last_segment_reaches_the_cap_in_one_piece() -> None:
    # Prompt 2, blocks of 4, segments of 4: the first one ends at 5 = 1 mod 4 after 3 tokens, the others have 4, and
    # what is left in front of the cap is not cut again.
    for cap in range(4, 12):
        engine = FakeEngine(endless, block_size=4)
        config = make_config(2, segment_length=4, max_completion_length=cap, initial_branching_factor=[2, 2])
        (tree,) = trees_of(engine, config, [[9] * 2])
        assert {tree.nodes[leaf].end for leaf in tree.leaves} == {cap}
        # Segments of 3, 4, 4, ...: the last one takes all that is left as soon as that is at most a segment.
        expected = 1 + max(-(-(cap - 3) // 4), 0) if cap > 4 else 1
        assert tree.nodes[tree.leaves[0]].depth + 1 == expected


def test_a_segment_is_cut_by_at_most_half() -> None:
    # Blocks of 5: prompt 3 and a segment of 5 ends at 8 = 6 + 2, cut to 3; prompt 4 at 9 = 6 + 3, not cut to 2.
    for prompt_length, first in ((3, 3), (4, 5)):
        engine = FakeEngine(endless, block_size=5)
        config = make_config(2, segment_length=5, max_completion_length=30)
        trees_of(engine, config, [[9] * prompt_length])
        assert engine.requests[0].max_tokens == first


def test_progress_is_reported_leaf_by_leaf_and_tree_by_tree() -> None:
    leaves: list[int] = []
    done: dict[int, SegmentTree] = {}
    handed_out: list[tuple[int, list[int]]] = []

    def on_tree(index: int, tree: SegmentTree) -> None:
        done[index] = tree
        handed_out.append((index, list(tree.leaves)))

    trees = TreeSampler(FakeEngine(memoryless(0.1), arrival=random.Random(1), slots=7), make_config(8), [EOS]).sample(
        prompts_of(6), seed=0, on_leaves=leaves.append, on_tree=on_tree
    )
    assert sum(leaves) == 48
    assert all(leaves)
    assert sorted(done) == list(range(6))
    assert list(done) != list(range(6))  # in order of completion
    assert all(done[i] is tree for i, tree in enumerate(trees))
    assert [leaves for _, leaves in sorted(handed_out)] == [tree.leaves for tree in trees]
    for tree in trees:  # depth-first
        before = list(tree.leaves)
        tree.sort_leaves()
        assert tree.leaves == before


def test_segments_and_tokens_of_the_engine_are_counted_per_call() -> None:
    class Engine(FakeEngine):
        """Finds all but the last token of a request in its cache."""

        def submit(self, requests: list[SegmentRequest]) -> None:
            super().submit(requests)
            self.num_cached_tokens += sum(len(request.token_ids) - 1 for request in requests)

    sampler = TreeSampler(Engine(endless), make_config(2), [EOS])
    for _ in range(2):
        sampler.sample(prompts_of(1), seed=0)
        # Two paths of four segments behind a prompt of 3: 2 * (3 + 6 + 9 + 12), and one less for each of 8 requests.
        assert sampler.stats.num_prompt_tokens == 60
        assert sampler.stats.num_cached_tokens == 52
        assert sampler.stats.num_segments == 8
