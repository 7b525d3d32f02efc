"""The sampler's laws over engines without a model: what may never happen, whatever the engine answers and when."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import EOS, FakeEngine, MarkovEngine, RecordingEngine, ScriptedEngine, endless, memoryless
from treepo_trl.engines import SegmentEngineError, SegmentRequest, SegmentResult
from treepo_trl.sampling.config import TreeSamplingConfig
from treepo_trl.sampling.sampler import TreeSampler
from treepo_trl.sampling.tree import SegmentTree


def make_config(width: int = 4, **changes: Any) -> TreeSamplingConfig:
    values = {
        "num_generations": width,
        "branching_factor": min(width, 2),
        "max_completion_length": 12,
        "segment_length": 3,
        "stop_repetition": False,
        **changes,
    }
    return TreeSamplingConfig(**values)


def prompts_of(count: int, length: int = 3) -> list[list[int]]:
    """Distinct prompts of the same length, so that a request names its tree."""
    return [[100 + i] * length for i in range(count)]


def fingerprint(trees: list[SegmentTree]) -> str:
    return json.dumps([tree.to_dict() for tree in trees])


@st.composite
def configs(draw: st.DrawFn) -> TreeSamplingConfig:
    """Every shape that ends with all leaves: fallback `none` is left out."""
    width = draw(st.integers(1, 16))
    segment_length = draw(st.integers(1, 6))
    low = draw(st.integers(1, width))
    initial = draw(st.sampled_from([None, [low, low], [low, draw(st.integers(low, width))]]))
    return make_config(
        width=width,
        branching_factor=draw(st.integers(1, width)),
        segment_length=segment_length,
        max_completion_length=draw(st.integers(segment_length, 30)),
        initial_branching_factor=initial,
        branching_policy=draw(st.sampled_from(["uniform", "low_prob", "high_prob", "entropy"])),
        branching_temperature=draw(st.sampled_from([0.01, 2.0, 50.0])),
        branching_temperature_end=draw(st.sampled_from([None, 0.5])),
        branch_schedule=draw(st.sampled_from(["early", "spread"])),
        fallback_policy=draw(st.sampled_from(["random", "low_prob", "root"])),
        fallback_candidates=draw(st.sampled_from(["finished", "finished_first", "all"])),
    )


@st.composite
def limits(draw: st.DrawFn) -> dict[str, Any]:
    """Slots and cache of an engine, small ones included."""
    return {
        "slots": draw(st.sampled_from([None, 1, 2, 7, 40])),
        "num_cache_tokens": draw(st.sampled_from([None, 1, 50, 400])),
        "block_size": draw(st.sampled_from([None, 1, 2, 5])),
        "reports_entropies": True,
    }


stop_probabilities = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.8, 1.0])
arrivals = st.none() | st.integers(0, 99)


def arrival(seed: int | None) -> random.Random | None:
    return None if seed is None else random.Random(seed)


# Laws


@settings(deadline=None)
@given(configs(), stop_probabilities, arrivals, st.integers(0, 9), st.integers(1, 4), limits())
def test_every_tree_is_complete_and_made_of_what_the_engine_returned(
    config: TreeSamplingConfig,
    stop: float,
    arrival_seed: int | None,
    seed: int,
    num_prompts: int,
    limits: dict[str, Any],
) -> None:
    engine = FakeEngine(memoryless(stop), seed=seed, arrival=arrival(arrival_seed), **limits)
    prompts = prompts_of(num_prompts)
    sampler = TreeSampler(engine, config, [EOS])
    trees = sampler.sample(prompts, seed=seed)

    # One tree per prompt, in order, with exactly W leaves, each a node of its own.
    assert [tree.prompt_ids for tree in trees] == prompts
    for tree in trees:
        assert len(tree.leaves) == len(set(tree.leaves)) == config.num_generations
        assert sum(tree.leaf_weights()) == pytest.approx(1.0)  # no path is left open
        for leaf in tree.leaves:
            completion = tree.completion_ids(leaf)
            assert 1 <= len(completion) <= config.max_completion_length
            reason = tree.nodes[leaf].finish_reason
            assert (completion[-1] == EOS) == (reason == "stop")
            assert EOS not in completion[:-1]
            if reason == "length":
                assert len(completion) == config.max_completion_length

    # Nodes and results are the same multiset of (what the engine was given, what it returned): each decoded token is
    # in exactly one node, and each request was the prompt followed by a path.
    def as_key(given_ids: list[int], token_ids: list[int], logprobs: list[float] | None) -> tuple[Any, ...]:
        assert logprobs is not None
        return tuple(given_ids), tuple(token_ids), tuple(logprobs)

    of_nodes = Counter(
        as_key(tree.prompt_ids + tree.completion_ids(node.parent), node.token_ids, node.logprobs)
        for tree in trees
        for node in tree.nodes
    )
    requests = {request.request_id: request for request in engine.requests}
    assert len(requests) == len(engine.requests), "request ids repeat"
    of_results = Counter(
        as_key(requests[result.request_id].token_ids, result.token_ids, result.logprobs) for result in engine.results
    )
    assert of_nodes == of_results
    assert all(1 <= request.max_tokens <= config.segment_length for request in engine.requests)
    assert sampler.stats.num_segments == len(engine.requests)
    assert sampler.stats.num_decoded_tokens == sum(tree.num_unique_tokens for tree in trees)
    assert engine.aborted == 0


@settings(deadline=None)
@given(configs(), stop_probabilities, arrivals, st.integers(1, 3), limits())
def test_finished_and_growing_paths_never_exceed_the_width_and_levels_wait_for_themselves(
    config: TreeSamplingConfig, stop: float, arrival_seed: int | None, num_prompts: int, limits: dict[str, Any]
) -> None:
    engine = RecordingEngine(memoryless(stop), arrival=arrival(arrival_seed), **limits)
    prompts = prompts_of(num_prompts)
    TreeSampler(engine, config, [EOS]).sample(prompts, seed=0)

    lengths = {request.request_id: len(request.token_ids) - 3 for request in engine.requests}
    owner = {request.request_id: request.token_ids[0] for request in engine.requests}
    flying, finished = Counter[int](), Counter[int]()
    for kind, items in engine.events:
        if kind == "submit":
            assert items, "an empty batch was submitted"
            if limits["slots"] is None:  # otherwise a level may be submitted in parts
                # A level is decided when the one before has arrived completely.
                assert all(flying[owner[request.request_id]] == 0 for request in items)
            else:
                assert sum(flying.values()) + len(items) <= limits["slots"]
            flying.update(owner[request.request_id] for request in items)
        else:
            for result in items:
                tree = owner[result.request_id]
                flying[tree] -= 1
                end = lengths[result.request_id] + len(result.token_ids)
                finished[tree] += result.token_ids[-1] == EOS or end == config.max_completion_length
        assert all(finished[prompt[0]] + flying[prompt[0]] <= config.num_generations for prompt in prompts)


@settings(deadline=None, max_examples=60)
@given(configs(), stop_probabilities, st.integers(0, 99), limits(), st.sampled_from([0, 7, "7/3/0"]))
def test_same_seed_gives_the_same_trees_whatever_the_order_of_arrival_and_the_number_of_slots(
    config: TreeSamplingConfig, stop: float, arrival_seed: int, limits: dict[str, Any], seed: int | str
) -> None:
    free = {"reports_entropies": True, "block_size": limits["block_size"]}
    runs = [
        TreeSampler(FakeEngine(memoryless(stop), arrival=arrival(order), **kwargs), config, [EOS]).sample(
            prompts_of(3), seed
        )
        for order, kwargs in ((None, free), (arrival_seed, free), (arrival_seed + 1, limits))
    ]
    assert fingerprint(runs[0]) == fingerprint(runs[1]) == fingerprint(runs[2])


@settings(deadline=None, max_examples=60)
@given(configs(), stop_probabilities, st.integers(1, 4))
def test_without_fallback_a_tree_may_lack_leaves_but_ends(
    config: TreeSamplingConfig, stop: float, num_prompts: int
) -> None:
    config.fallback_policy = "none"
    sampler = TreeSampler(FakeEngine(memoryless(stop), reports_entropies=True), config, [EOS])
    for tree in sampler.sample(prompts_of(num_prompts), seed=0):
        assert 1 <= len(tree.leaves) <= config.num_generations
        assert sum(tree.leaf_weights()) == pytest.approx(1.0)
    assert sampler.stats.num_fallback_leaves == 0


def test_a_sampler_can_be_used_again_and_forgets_nothing_but_the_counts() -> None:
    config = make_config(8, initial_branching_factor=[1, 8])
    sampler = TreeSampler(FakeEngine(memoryless(0.1)), config, [EOS])
    first = sampler.sample(prompts_of(3), seed=1)
    segments = sampler.stats.num_segments
    sampler.engine = FakeEngine(memoryless(0.1))
    assert fingerprint(sampler.sample(prompts_of(3), seed=1)) == fingerprint(first)
    assert sampler.stats.num_segments == segments


def test_the_seed_matters() -> None:
    config = make_config(16, initial_branching_factor=[1, 16])
    trees = [TreeSampler(FakeEngine(memoryless(0.05)), config, [EOS]).sample(prompts_of(4), seed) for seed in (0, 1)]
    assert fingerprint(trees[0]) != fingerprint(trees[1])


def test_a_prompts_tree_does_not_depend_on_the_prompts_behind_it() -> None:
    config = make_config(8, initial_branching_factor=[1, 8])
    alone = TreeSampler(FakeEngine(memoryless(0.1)), config, [EOS]).sample(prompts_of(1), seed=0)
    together = TreeSampler(FakeEngine(memoryless(0.1)), config, [EOS]).sample(prompts_of(3), seed=0)
    assert fingerprint(alone) == fingerprint(together[:1])


def test_no_prompts_give_no_trees_and_ask_the_engine_for_nothing() -> None:
    engine = RecordingEngine(endless)
    assert TreeSampler(engine, make_config(), [EOS]).sample([], seed=0) == []
    assert engine.events == []


def test_equal_prompts_get_trees_of_their_own() -> None:
    trees = TreeSampler(FakeEngine(memoryless(0.2)), make_config(4), [EOS]).sample([[5, 6]] * 3, seed=0)
    assert [len(tree.leaves) for tree in trees] == [4, 4, 4]


# Levels


def test_trees_do_not_wait_for_one_another() -> None:
    # Nothing of the first prompt arrives while anything else is pending.
    config = make_config(8, branching_factor=2, segment_length=3, max_completion_length=12)
    engine = RecordingEngine(endless, withhold=lambda request: request.token_ids[0] == 100)
    TreeSampler(engine, config, [EOS]).sample(prompts_of(3), seed=0)
    arrived = [
        requests_of(engine, result).token_ids[0]
        for kind, items in engine.events
        if kind == "collect"
        for result in items
    ]
    # Segments of a tree: 2 + 4 + 8 + 8 = 22. All 44 of the others come before the first of the slow one.
    assert arrived == [owner for owner in arrived if owner != 100] + [100] * 22
    assert len(arrived) == 66


def requests_of(engine: FakeEngine, result: SegmentResult) -> SegmentRequest:
    return next(request for request in engine.requests if request.request_id == result.request_id)


def test_the_levels_of_endless_paths_double_until_the_width() -> None:
    engine = RecordingEngine(endless)
    config = make_config(16, segment_length=2, max_completion_length=12)
    (tree,) = TreeSampler(engine, config, [EOS]).sample(prompts_of(1), seed=0)
    levels = [len(items) for kind, items in engine.events if kind == "submit"]
    assert levels == [2, 4, 8, 16, 16, 16]  # 6 levels of 2 tokens are 12
    assert Counter(node.finish_reason for node in tree.nodes) == {None: 2 + 4 + 8 + 16 + 16, "length": 16}


def test_spread_opens_the_branches_evenly() -> None:
    engine = RecordingEngine(endless)
    config = make_config(8, segment_length=2, max_completion_length=12, branch_schedule="spread")
    TreeSampler(engine, config, [EOS]).sample(prompts_of(1), seed=0)
    levels = [len(items) for kind, items in engine.events if kind == "submit"]
    # 8 ** (d/6) rounded up for d = 1..6 is 2, 2, 3, 4, 6, 8 (see test_branching).
    assert levels == [2, 2, 3, 4, 6, 8]


def test_a_finished_paths_budget_moves_to_the_live_ones() -> None:
    # W = 8, N = 2. Level 1 (2 segments): one ends. Level 2 then holds min(8 - 1, 2 * (1 + 1)) = 4, all of them
    # children of the live path; all four end, so 3 leaves are missing and fall back.
    engine = ScriptedEngine([[EOS], [1, 1], [EOS], [EOS], [EOS], [EOS], [EOS], [EOS], [EOS]])
    config = make_config(8, segment_length=2, max_completion_length=6, fallback_policy="root")
    sampler = TreeSampler(engine, config, [EOS])
    (tree,) = sampler.sample([[7]], seed=0)
    assert [node.parent for node in tree.nodes] == [None, None, 1, 1, 1, 1, None, None, None]
    assert sampler.stats.num_fallback_leaves == 3
    assert sampler.stats.num_decoded_tokens == 8 * 1 + 2
    assert sampler.stats.num_segments == 9
    assert engine.num_submits == 3  # one batch per level: 2, 4, 3
    assert 0 <= sampler.stats.engine_seconds <= sampler.stats.seconds


def test_fallback_leaves_that_branch_from_an_inner_node_count_once() -> None:
    # W = 4, N = 2: two live paths, four children, all of them end: nothing is missing, nothing falls back.
    engine = ScriptedEngine([[1, 1], [2, 2], [EOS], [EOS], [EOS], [EOS]])
    sampler = TreeSampler(engine, make_config(4, segment_length=2, max_completion_length=6), [EOS])
    sampler.sample([[7]], seed=0)
    assert sampler.stats.num_fallback_leaves == 0

    # W = 4: the first level of two ends at once; the fallback's two paths go on for a second segment.
    engine = ScriptedEngine([[EOS], [EOS], [1, 1], [2, 2], [EOS], [3, EOS]])
    (tree,) = sampler_of(engine, sampler).sample([[7]], seed=0)
    assert sampler.stats.num_fallback_leaves == 2
    assert [tree.nodes[leaf].depth for leaf in tree.leaves] == [0, 0, 1, 1]


def sampler_of(engine: Any, sampler: TreeSampler) -> TreeSampler:
    sampler.engine = engine
    return sampler


@pytest.mark.parametrize("schedule", ["early", "spread"])
def test_branching_factor_one_asks_for_independent_completions(schedule: str) -> None:
    engine = FakeEngine(memoryless(0.1))
    config = make_config(6, branching_factor=1, branch_schedule=schedule)
    sampler = TreeSampler(engine, config, [EOS])
    trees = sampler.sample(prompts_of(2), seed=0)
    for tree in trees:
        assert len(tree.root_children) == 6
        assert all(len(node.children) <= 1 for node in tree.nodes)
        assert tree.num_unique_tokens == tree.num_leaf_tokens
    assert [request.token_ids for request in engine.requests[:12]] == [[100] * 3] * 6 + [[101] * 3] * 6
    assert sampler.stats.num_fallback_leaves == 0


def test_branching_factor_one_equals_sampling_each_completion_alone() -> None:
    config = make_config(6, branching_factor=1, segment_length=4, max_completion_length=18)
    (tree,) = TreeSampler(FakeEngine(memoryless(0.05), seed=3), config, [EOS]).sample([[7, 8]], seed=0)
    # The same engine again, one completion after the other: six first segments, then each path until it ends.
    engine = FakeEngine(memoryless(0.05), seed=3)
    engine.submit([SegmentRequest(i, [7, 8], 4) for i in range(6)])
    alone = [list(result.token_ids) for result in engine.collect()]
    for i, tokens in enumerate(alone):
        while tokens[-1] != EOS and len(tokens) < 18:
            engine.submit([SegmentRequest(6 + 10 * i + len(tokens), [7, 8, *tokens], min(4, 18 - len(tokens)))])
            tokens.extend(engine.collect()[0].token_ids)
    assert sorted(map(tree.completion_ids, tree.leaves)) == sorted(alone)


def test_a_range_draws_different_numbers_for_different_prompts() -> None:
    config = make_config(16, initial_branching_factor=[2, 8])
    trees = TreeSampler(FakeEngine(endless), config, [EOS]).sample(prompts_of(40), seed=0)
    first_levels = [len(tree.root_children) for tree in trees]  # endless paths: no fallback adds children to the root
    assert set(first_levels) == set(range(2, 9))


@pytest.mark.parametrize(("policy", "favoured"), [("low_prob", 1), ("high_prob", 0)])
def test_the_branching_policy_reads_the_last_segment(policy: str, favoured: int) -> None:
    # Log-probabilities of the script are -1, -2, ... per token, so a longer segment has a lower mean: path 0 has -1
    # (one token), path 1 has -2 (three). W = 4 over 2 live paths at a low temperature: 3 and 1 children.
    engine = ScriptedEngine([[1], [2, 2, 2], *[[EOS]] * 4])
    config = make_config(4, branching_policy=policy, branching_temperature=0.05, max_completion_length=9)
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[7]], seed=0)
    assert len(tree.nodes[favoured].children) == 3
    assert len(tree.nodes[1 - favoured].children) == 1


# Slots and the engine's cache


def test_slots_stay_full_while_there_is_work() -> None:
    """Whenever the sampler waits, every slot is taken or everything that can run does."""
    engine = RecordingEngine(memoryless(0.05), arrival=random.Random(0), slots=20)
    config = make_config(8, max_completion_length=30)
    TreeSampler(engine, config, [EOS]).sample(prompts_of(60), seed=0)
    running, started = 0, set[int]()
    owner = {request.request_id: request.token_ids[0] for request in engine.requests}
    left = Counter(owner.values())
    for i, (kind, items) in enumerate(engine.events):
        if kind == "submit":
            running += len(items)
            started |= {owner[request.request_id] for request in items}
            # With a prompt that was not started there is always something to run.
            if len(started) < 60:
                assert running == 20
        else:
            running -= len(items)
            for result in items:
                left[owner[result.request_id]] -= 1
            if len(started) < 60:
                assert engine.events[i + 1][0] == "submit", "a free slot was left empty"
        assert running <= 20
    assert started == {100 + i for i in range(60)}


def test_old_trees_go_first() -> None:
    # One slot: a tree is started only when all older ones are done.
    engine = RecordingEngine(memoryless(0.1), slots=1)
    TreeSampler(engine, make_config(6), [EOS]).sample(prompts_of(5), seed=0)
    owners = [request.token_ids[0] for request in engine.requests]
    assert owners == sorted(owners)
    # Several slots: of the segments that are ready, the oldest tree's are submitted first. A tree that waits for a
    # segment lets a younger one use the slot.
    engine = RecordingEngine(memoryless(0.1), slots=4, arrival=random.Random(3))
    TreeSampler(engine, make_config(6), [EOS]).sample(prompts_of(30), seed=0)
    first = [next(i for i, r in enumerate(engine.requests) if r.token_ids[0] == 100 + k) for k in range(30)]
    last = [max(i for i, r in enumerate(engine.requests) if r.token_ids[0] == 100 + k) for k in range(30)]
    assert first == sorted(first)
    # At most four trees are under way at any time, as many as there are slots.
    assert all(sum(first[k] <= i <= last[k] for k in range(30)) <= 5 for i in range(len(engine.requests)))


@pytest.mark.parametrize("slots", [None, 5, 40])
def test_segments_are_submitted_only_for_the_oldest_trees_that_the_engines_cache_holds(slots: int | None) -> None:
    """Law: with every request, its tree and all older unfinished ones fit, or it is the oldest one."""
    capacity = 90
    engine = RecordingEngine(memoryless(0.05), num_cache_tokens=capacity, arrival=random.Random(0), slots=slots)
    TreeSampler(engine, make_config(4), [EOS]).sample(prompts_of(12), seed=0)
    owner = {request.request_id: request.token_ids[0] for request in engine.requests}
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
    TreeSampler(engine, make_config(4), [EOS]).sample(prompts_of(9), seed=0)
    assert engine.events[0][0] == "submit"
    assert len(engine.events[0][1]) == 6 * 2


def test_one_long_prompt_does_not_take_the_slots_of_the_others_once_it_is_done() -> None:
    class Engine(RecordingEngine):
        """Room for 400 tokens: rows times the longest of them."""

        def num_slots(self, length: int) -> int | None:
            return 400 // max(length, 1)

    engine = Engine(endless)
    prompts = [[99] * 150, *prompts_of(30)]
    TreeSampler(engine, make_config(4), [EOS]).sample(prompts, seed=0)
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
    trees = TreeSampler(engine, make_config(4), [EOS]).sample(prompts_of(3), seed=0)
    assert [len(tree.leaves) for tree in trees] == [4, 4, 4]
    owners = [request.token_ids[0] for request in engine.requests]
    assert owners == sorted(owners)  # one after the other


def test_an_engine_is_asked_for_its_slots_at_the_longest_sequence() -> None:
    asked = []

    class Engine(FakeEngine):
        def num_slots(self, length: int) -> int | None:
            asked.append(length)
            return 2

    TreeSampler(Engine(endless), make_config(2), [EOS]).sample(prompts_of(2), seed=0)
    assert max(asked) == 3 + 12
    assert asked[-1] == 0  # nothing runs any more


@pytest.mark.parametrize("prompt_length", [1, 3, 16, 17, 30])
def test_segments_end_where_the_engines_cache_goes_on(prompt_length: int) -> None:
    """Blocks of 4 tokens, segments of at most 10: with 4 k + 1 tokens all but the last one are in full blocks."""
    engine = FakeEngine(endless, block_size=4)
    config = make_config(8, segment_length=10, max_completion_length=50)
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[9] * prompt_length], seed=0)
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
    TreeSampler(engine, config, [EOS]).sample([[9] * 3], seed=0)
    # 3, 6, 9, 12, 15, then 18 is one behind 17: cut to 2 tokens; 20, 23, 26, and the cap at 27.
    assert sorted({len(request.token_ids) for request in engine.requests}) == [3, 6, 9, 12, 15, 17, 20, 23, 26]


def test_a_last_segment_reaches_the_cap_in_one_piece() -> None:
    # Prompt 2, blocks of 4, segments of 4: the first one ends at 5 = 1 mod 4 after 3 tokens, the others have 4, and
    # what is left in front of the cap is not cut again.
    for cap in range(4, 12):
        engine = FakeEngine(endless, block_size=4)
        config = make_config(2, segment_length=4, max_completion_length=cap, initial_branching_factor=[2, 2])
        (tree,) = TreeSampler(engine, config, [EOS]).sample([[9] * 2], seed=0)
        assert {tree.nodes[leaf].end for leaf in tree.leaves} == {cap}
        # Segments of 3, 4, 4, ...: the last one takes all that is left as soon as that is at most a segment.
        expected = 1 + max(-(-(cap - 3) // 4), 0) if cap > 4 else 1
        assert tree.nodes[tree.leaves[0]].depth + 1 == expected


def test_a_segment_is_cut_by_at_most_half() -> None:
    # Blocks of 5: prompt 3 and a segment of 5 ends at 8 = 6 + 2, cut to 3; prompt 4 at 9 = 6 + 3, not cut to 2.
    for prompt_length, first in ((3, 3), (4, 5)):
        engine = FakeEngine(endless, block_size=5)
        config = make_config(2, segment_length=5, max_completion_length=30)
        TreeSampler(engine, config, [EOS]).sample([[9] * prompt_length], seed=0)
        assert engine.requests[0].max_tokens == first


def test_progress_is_reported_leaf_by_leaf_and_tree_by_tree() -> None:
    leaves: list[int] = []
    done: dict[int, SegmentTree] = {}
    trees = TreeSampler(FakeEngine(memoryless(0.1), arrival=random.Random(1), slots=7), make_config(8), [EOS]).sample(
        prompts_of(6), seed=0, on_leaves=leaves.append, on_tree=done.__setitem__
    )
    assert sum(leaves) == 48
    assert all(leaves)
    assert sorted(done) == list(range(6))
    assert list(done) != list(range(6))  # in order of completion
    assert all(done[i] is tree for i, tree in enumerate(trees))


def test_tokens_of_the_engine_are_counted_per_call() -> None:
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


# Entropy


def test_the_entropy_policy_reads_the_entropies_of_the_last_segment() -> None:
    class Engine(FakeEngine):
        """Paths that begin with 1 are uncertain, those with 2 are not; log-probabilities say the opposite."""

        def answer(self, request: SegmentRequest) -> SegmentResult:
            result = super().answer(request)
            uncertain = (request.token_ids + result.token_ids)[1] == 1
            n = len(result.token_ids)
            return SegmentResult(
                result.request_id, result.token_ids, [-0.1 if uncertain else -5.0] * n, "length", [2.0 * uncertain] * n
            )

    firsts = iter([1, 1, 1, 2, 2, 2])
    engine = Engine(lambda path, rng: next(firsts, 3), reports_entropies=True)
    config = make_config(8, branching_policy="entropy", branching_temperature=0.1)
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[7]], seed=0)
    assert [tree.nodes[node].entropy for node in tree.root_children] == [2.0, 0.0]
    # Four children for two paths: one each, and both spare ones go to the uncertain one at a low temperature.
    assert [len(tree.nodes[node].children) for node in tree.root_children] == [3, 1]


def test_the_temperature_schedule_reaches_the_split() -> None:
    """Two live paths with scores 1 and 2 (low_prob: -(-1), -(-2)); four children, so two spare."""
    counts = []
    for progress in (0.0, 1.0):
        engine = ScriptedEngine([[1], [2, 2, 2], *[[EOS]] * 4])
        config = make_config(
            4,
            branching_policy="low_prob",
            branching_temperature=1000.0,
            branching_temperature_end=0.05,
            max_completion_length=9,
        )
        (tree,) = TreeSampler(engine, config, [EOS]).sample([[7]], seed=0, progress=progress)
        counts.append([len(tree.nodes[node].children) for node in (0, 1)])
    assert counts == [[2, 2], [1, 3]]


def test_entropy_needs_an_engine_that_reports_it() -> None:
    with pytest.raises(ValueError, match=r"`branching_policy='entropy'` needs .*with_entropies=True"):
        TreeSampler(FakeEngine(endless), make_config(branching_policy="entropy"), [EOS])


def test_entropies_of_tokens_that_are_cut_do_not_count() -> None:
    class Engine(ScriptedEngine):
        reports_entropies = True

        def collect(self) -> list[SegmentResult]:
            return [
                SegmentResult(r.request_id, r.token_ids, r.logprobs, r.finish_reason, [1.0, 3.0, 100.0])
                for r in super().collect()
            ]

    engine = Engine([[5, EOS, 7], [5, 6, EOS]])
    (tree,) = TreeSampler(engine, make_config(2), [EOS]).sample([[7]], seed=0)
    assert [node.entropy for node in tree.nodes] == pytest.approx([2.0, 104 / 3])


# Schedules and budgets


def test_spread_counts_finished_paths_as_open_ones() -> None:
    # W = 8, cap 12, l = 2: widths 2, 2, 3, 4, 6, 8. One path ends in the first segment, so the levels behind it hold
    # one path less: 1, 2, 3, 5, 7.
    engine = ScriptedEngine([[EOS], *[[1, 1]] * 200])
    config = make_config(8, segment_length=2, max_completion_length=12, branch_schedule="spread")
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[7]], seed=0)
    depths = Counter(node.depth for node in tree.nodes)
    assert [depths[depth] for depth in range(6)] == [2, 1, 2, 3, 5, 7]


def test_spread_follows_the_expected_length() -> None:
    def levels(expected: int | None, **changes: Any) -> list[int]:
        engine = RecordingEngine(endless)
        config = make_config(8, segment_length=2, max_completion_length=12, branch_schedule="spread", **changes)
        TreeSampler(engine, config, [EOS]).sample(prompts_of(1), seed=0, expected_length=expected)
        return [len(items) for kind, items in engine.events if kind == "submit"]

    assert levels(None) == [2, 2, 3, 4, 6, 8]  # 8 ** (d/6)
    assert levels(6) == [2, 4, 8, 8, 8, 8]  # 8 ** (d/3): 2, 4, 8
    assert levels(5) == [2, 4, 8, 8, 8, 8]  # 8 ** (4/5) = 5.3, but a level at most doubles
    assert levels(100) == levels(None)  # never beyond the cap
    assert levels(6, expected_completion_length=12) == levels(None)  # what the user says goes first


def test_spread_counts_from_a_prompts_own_room() -> None:
    # Context 20 leaves 6 tokens for the long prompt: three segments of 2.
    engine = RecordingEngine(endless, context_length=20)
    config = make_config(8, segment_length=2, max_completion_length=12, branch_schedule="spread")
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[100] * 14], seed=0)
    assert [len(items) for kind, items in engine.events if kind == "submit"] == [2, 4, 8]
    assert len(tree.leaves) == 8


@settings(deadline=None)
@given(
    configs(),
    stop_probabilities,
    st.integers(0, 60),
    st.sampled_from([None, 3, 20]),
    st.integers(1, 3),
    st.sampled_from(["random", "low_prob", "root", "none"]),
)
def test_a_token_budget_is_never_exceeded(
    config: TreeSamplingConfig, stop: float, extra: int, expected: int | None, num_prompts: int, fallback: str
) -> None:
    config.max_tree_tokens = config.max_completion_length + extra
    config.fallback_policy = fallback
    sampler = TreeSampler(FakeEngine(memoryless(stop), reports_entropies=True), config, [EOS])
    trees = sampler.sample(prompts_of(num_prompts), seed=0, expected_length=expected)
    for tree in trees:
        assert 1 <= len(tree.leaves) <= config.num_generations
        assert tree.num_unique_tokens <= config.max_tree_tokens
        assert sum(tree.leaf_weights()) == pytest.approx(1.0)  # no path is left open
    assert sampler.stats.num_decoded_tokens == sum(tree.num_unique_tokens for tree in trees)


def test_a_tree_opens_no_more_paths_than_its_budget_can_finish() -> None:
    """Paths of 12 tokens, known beforehand: a budget of 5 paths opens no more than 5 and cuts none."""
    for budget, most in ((12, 1), (24, 2), (40, 3), (60, 5), (1000, 16)):
        engine = FakeEngine(lambda path, rng: EOS if len(path) == 14 else 5)
        config = make_config(16, max_completion_length=12, max_tree_tokens=budget, fallback_policy="none")
        (tree,) = TreeSampler(engine, config, [EOS]).sample([[7] * 3], seed=0, expected_length=12)
        assert {tree.nodes[leaf].finish_reason for leaf in tree.leaves} == {"stop"}
        assert tree.num_unique_tokens <= budget
        assert min(most, 2) <= len(tree.leaves) <= 16
        if budget <= 24:
            assert len(tree.leaves) == most


def test_lengths_seen_so_far_guide_the_budget() -> None:
    """Paths of 10 tokens, not known beforehand, and 60 tokens for the tree."""
    engine = FakeEngine(lambda path, rng: EOS if len(path) == 10 else 5)
    config = make_config(16, segment_length=3, max_completion_length=30, max_tree_tokens=60, fallback_policy="root")
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[7]], seed=0)
    # Levels of 2, 4, 4 and 4 paths: 6 + 12 + 12 + 4 tokens (42 // 9 and 30 // 12 afford no more). 26 are left, which
    # two more paths of 10 fit into, and 6 at the end, into which none does.
    assert tree.num_unique_tokens == 34 + 2 * 10
    assert len(tree.leaves) == 6
    assert {tree.nodes[leaf].finish_reason for leaf in tree.leaves} == {"stop"}


@settings(deadline=None)
@given(configs(), stop_probabilities, st.integers(0, 60))
def test_fallback_leaves_are_those_that_a_fallback_asked_for(
    config: TreeSamplingConfig, stop: float, extra: int
) -> None:
    config.max_tree_tokens = config.max_completion_length + extra
    sampler = TreeSampler(FakeEngine(memoryless(stop), reports_entropies=True), config, [EOS])
    trees = sampler.sample(prompts_of(3), seed=0)
    assert sampler.stats.num_fallback_leaves <= sum(len(tree.leaves) for tree in trees)


def test_a_large_budget_changes_nothing() -> None:
    runs = [
        TreeSampler(FakeEngine(memoryless(0.1)), make_config(8, max_tree_tokens=budget), [EOS]).sample(
            prompts_of(5), seed=0
        )
        for budget in (None, 10**6)
    ]
    assert fingerprint(runs[0]) == fingerprint(runs[1])


# Ends


def test_eos_as_the_first_token_finishes_a_path() -> None:
    engine = FakeEngine(memoryless(1.0))
    (tree,) = TreeSampler(engine, make_config(4), [EOS]).sample(prompts_of(1), seed=0)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [[EOS]] * 4
    assert all(EOS not in request.token_ids for request in engine.requests)


def test_every_eos_of_a_list_ends_a_path_and_what_follows_is_cut() -> None:
    engine = ScriptedEngine([[5, 9, 7], [5, EOS, 9], [5, 6, 9], [9]])
    config = make_config(4, branching_factor=1)
    (tree,) = TreeSampler(engine, config, [EOS, 9]).sample([[7]], seed=0)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [[5, 9], [5, EOS], [5, 6, 9], [9]]
    assert [tree.logprobs(leaf) for leaf in tree.leaves] == [[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0, -3.0], [-1.0]]
    assert {tree.nodes[leaf].finish_reason for leaf in tree.leaves} == {"stop"}


def test_length_stops_a_path_exactly_at_the_cap() -> None:
    engine = FakeEngine(endless)
    config = make_config(2, segment_length=5, max_completion_length=12, initial_branching_factor=[2, 2])
    (tree,) = TreeSampler(engine, config, [EOS]).sample(prompts_of(1), seed=0)
    assert [len(tree.completion_ids(leaf)) for leaf in tree.leaves] == [12, 12]
    assert sorted({request.max_tokens for request in engine.requests}) == [2, 5]  # 5 + 5 + 2
    assert {tree.nodes[leaf].finish_reason for leaf in tree.leaves} == {"length"}


def test_eos_exactly_at_the_cap_is_a_stop() -> None:
    engine = ScriptedEngine([[1, 2], [1, 2], [3, EOS], [3, 4]])
    config = make_config(2, branching_factor=1, segment_length=2, max_completion_length=4)
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[7]], seed=0)
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["stop", "length"]


# Text rules; `decode_words` writes token 7 as <7>


Decode = Callable[[list[int]], str]


def pattern_config(**changes: Any) -> TreeSamplingConfig:
    return make_config(**{"width": 2, "branching_factor": 1, "stop_pattern": "<7><8>", **changes})


def test_a_pattern_across_a_segment_boundary_ends_the_path_where_it_ended(decode_words: Decode) -> None:
    engine = ScriptedEngine([[1, 2, 7], [1, 2, 3], [8, 4, 5], [4, 7, 8], [9, EOS], [9, EOS]])
    sampler = TreeSampler(engine, pattern_config(), [EOS], decode_words)
    (tree,) = sampler.sample([[7]], seed=0)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [[1, 2, 7, 8], [1, 2, 3, 4, 7, 8]]
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["pattern", "pattern"]
    assert tree.logprobs(tree.leaves[0]) == [-1.0, -2.0, -3.0, -1.0]
    assert sampler.stats.num_decoded_tokens == 12  # the two tokens behind the first match were decoded too
    assert tree.num_unique_tokens == 10


def test_the_prompt_does_not_match(decode_words: Decode) -> None:
    engine = ScriptedEngine([[8, 1, EOS], [1, EOS]])
    (tree,) = TreeSampler(engine, pattern_config(), [EOS], decode_words).sample([[7, 8, 7]], seed=0)
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["stop", "stop"]


def test_a_pattern_that_eos_follows_directly_is_an_ordinary_stop(decode_words: Decode) -> None:
    # The second path goes on behind the match before its EOS: the rest is cut.
    engine = ScriptedEngine([[7, 8, EOS], [7, 8, 1, EOS]])
    config = pattern_config(segment_length=4)
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[1]], seed=0)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [[7, 8, EOS], [7, 8]]
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["stop", "pattern"]


def test_text_behind_eos_cannot_match(decode_words: Decode) -> None:
    engine = ScriptedEngine([[1, EOS, 7, 8], [7, EOS, 8]])
    config = pattern_config(segment_length=4)
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[1]], seed=0)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [[1, EOS], [7, EOS]]


def test_a_pattern_exactly_at_the_cap_is_a_pattern(decode_words: Decode) -> None:
    engine = ScriptedEngine([[1, 7], [1, 7], [8, 8], [2, 3]])
    config = pattern_config(segment_length=2, max_completion_length=4)
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[1]], seed=0)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [[1, 7, 8], [1, 7, 2, 3]]
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["pattern", "length"]


def test_a_pattern_that_spans_three_short_segments_is_found(decode_words: Decode) -> None:
    engine = ScriptedEngine([[7], [7], [8], [1], [9], [8]])
    config = pattern_config(segment_length=1, max_completion_length=3, stop_pattern="<7><8><9>")
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[1]], seed=0)
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["pattern", "length"]


@pytest.mark.parametrize("fallback", ["random", "low_prob", "root"])
@pytest.mark.parametrize("segment_length", [1, 2, 5, 9, 20])
def test_text_rules_see_the_text_of_the_whole_path_after_branching_and_fallback(
    fallback: str, segment_length: int, decode_words: Decode
) -> None:
    """Four tokens that may occur anywhere: a path ends with the first <1><2>, never later and never without."""
    config = make_config(
        12,
        segment_length=segment_length,
        max_completion_length=40,
        stop_pattern="<1><2>",
        fallback_policy=fallback,
    )
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


def decode_bytes(ids: list[int]) -> str:
    """Token t is the byte t; 0 is special and has no text."""
    return bytes(i for i in ids if i != EOS).decode("utf-8", errors="replace")


def sample_text(text: str, segment_length: int, pattern: str) -> list[tuple[str | None, bytes]]:
    """Reason and bytes of two paths of an engine that writes `text`, one token per byte."""
    ids = [*text.encode(), EOS]
    config = make_config(
        2, branching_factor=1, segment_length=segment_length, max_completion_length=100, stop_pattern=pattern
    )
    engine = FakeEngine(lambda path, rng: ids[len(path) - 1])
    (tree,) = TreeSampler(engine, config, [EOS], decode_bytes).sample([[255]], seed=0)
    return [(tree.nodes[leaf].finish_reason, bytes(tree.completion_ids(leaf))) for leaf in tree.leaves]


@pytest.mark.parametrize("segment_length", [1, 2, 3, 4, 5, 7, 100])
def test_multi_byte_text_matches_wherever_segments_are_cut(segment_length: int) -> None:
    paths = sample_text("x😀 the 答案:7。 and on", segment_length, "😀 the 答案:7")
    assert paths == [("pattern", "x😀 the 答案:7".encode())] * 2


def decode_byte_fallback(ids: list[int]) -> str:
    """One U+FFFD per byte of a run that is no UTF-8, as tokenizers with byte fallback do; ASCII splits runs."""
    text, run = "", b""
    for byte in [*[i for i in ids if i != EOS], None]:
        if byte is not None and byte >= 128:
            run += bytes([byte])
            continue
        try:
            text += run.decode("utf-8")
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        text, run = text + ("" if byte is None else chr(byte)), b""
    return text


@pytest.mark.parametrize("segment_length", [1, 2, 3, 5, 6, 9, 17])
def test_long_runs_of_bytes_come_out_whole_with_byte_fallback(segment_length: int) -> None:
    text = "a 😀😀😀😀😀😀 b 答案是七。 and so on and so forth"
    ids = [*text.encode(), EOS]
    config = make_config(
        2, branching_factor=1, segment_length=segment_length, max_completion_length=100, stop_pattern="是七"
    )
    engine = FakeEngine(lambda path, rng: ids[len(path) - 1])
    (tree,) = TreeSampler(engine, config, [EOS], decode_byte_fallback).sample([[255]], seed=0)
    assert {tree.nodes[leaf].finish_reason for leaf in tree.leaves} == {"pattern"}


@pytest.mark.parametrize("segment_length", [4, 5, 7, 100])
@pytest.mark.parametrize("pattern", ["7。", "答.*。"])
def test_a_pattern_that_ends_with_a_multi_byte_character_keeps_all_of_it(pattern: str, segment_length: int) -> None:
    paths = sample_text("x😀 the 答案:7。 and on", segment_length, pattern)
    assert paths == [("pattern", "x😀 the 答案:7。".encode())] * 2


def test_a_loop_across_segments_ends_the_path(decode_words: Decode) -> None:
    # Two tokens <1><2> are 6 characters. 1024 characters are reached with 342 tokens, so the 22nd segment of 16 tokens
    # (352) ends the path.
    config = make_config(2, branching_factor=1, segment_length=16, max_completion_length=400, stop_repetition=True)
    engine = FakeEngine(lambda path, rng: 1 + len(path) % 2)
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[5]], seed=0)
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["repetition"] * 2
    assert [tree.nodes[leaf].end for leaf in tree.leaves] == [352, 352]


def test_a_loop_does_not_end_the_path_when_the_rule_is_off(decode_words: Decode) -> None:
    config = make_config(2, branching_factor=1, segment_length=16, max_completion_length=200, stop_repetition=False)
    engine = FakeEngine(lambda path, rng: 1 + len(path) % 2)
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[5]], seed=0)
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["length"] * 2


def test_a_loop_that_ends_with_eos_is_a_stop(decode_words: Decode) -> None:
    config = make_config(2, branching_factor=1, segment_length=200, max_completion_length=200, stop_repetition=True)
    engine = FakeEngine(lambda path, rng: EOS if len(path) == 150 else 1 + len(path) % 2)
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[5]], seed=0)
    assert [tree.nodes[leaf].finish_reason for leaf in tree.leaves] == ["stop"] * 2


@pytest.mark.parametrize("rule", [{"stop_pattern": "x"}, {"stop_repetition": True}])
def test_a_text_rule_without_decode_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pass `decode`"):
        TreeSampler(FakeEngine(endless), make_config(**rule), [EOS])


# Engine limits and errors


class BrokenEngine(FakeEngine):
    """Fails in the third `collect`, or when asked to `submit` the second time."""

    def __init__(self, error: BaseException, where: str) -> None:
        super().__init__(endless)
        self.error, self.where, self.calls = error, where, Counter[str]()

    def _count(self, where: str, limit: int) -> None:
        self.calls[where] += 1
        if self.where == where and self.calls[where] == limit:
            raise self.error

    def submit(self, requests: list[SegmentRequest]) -> None:
        super().submit(requests)
        self._count("submit", 2)

    def collect(self) -> list[SegmentResult]:
        self._count("collect", 3)
        return super().collect()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["submit", "collect"])
def test_an_engine_error_aborts_what_is_running_and_is_not_hidden(error: BaseException, where: str) -> None:
    engine = BrokenEngine(error, where)
    sampler = TreeSampler(engine, make_config(8), [EOS])
    with pytest.raises(type(error)) as caught:
        sampler.sample(prompts_of(2), seed=0)
    assert caught.value is error
    assert engine.aborted == 1
    assert "While sampling prompts 0, 1 of 2" in caught.value.__notes__[-1]
    engine.where = ""  # the engine works again: nothing of the broken call is left
    trees = sampler.sample(prompts_of(2), seed=0)
    assert [len(tree.leaves) for tree in trees] == [8, 8]


class FailingEngine(FakeEngine):
    """Fails in its n-th call, once."""

    calls, fails_at = 0, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of memory")

    def submit(self, requests: list[SegmentRequest]) -> None:
        self._count()
        super().submit(requests)

    def collect(self) -> list[SegmentResult]:
        self._count()
        return super().collect()

    def abort(self) -> None:
        super().abort()
        self.requests.clear()


@settings(deadline=None)
@given(configs(), stop_probabilities, arrivals, limits(), st.integers(1, 25))
def test_after_a_failure_anywhere_nothing_is_left_behind(
    config: TreeSamplingConfig, stop: float, arrival_seed: int | None, limits: dict[str, Any], fails_at: int
) -> None:
    engine = FailingEngine(memoryless(stop), arrival=arrival(arrival_seed), **limits)
    engine.fails_at = fails_at
    sampler = TreeSampler(engine, config, [EOS])
    first, error = None, None
    try:
        first = sampler.sample(prompts_of(3), seed=0)
    except RuntimeError as caught:
        error = caught
    assert (error is not None) == (engine.calls >= fails_at)
    assert engine.aborted == (error is not None)
    assert error is None or any("While sampling prompt" in note for note in error.__notes__)
    engine.abort()
    engine.fails_at = 0
    again = sampler.sample(prompts_of(3), seed=0)
    assert [len(tree.leaves) for tree in again] == [config.num_generations] * 3
    if first is not None:
        assert fingerprint(first) == fingerprint(again)


def test_a_request_that_the_engine_refuses_names_its_prompt(decode_words: Decode) -> None:
    class Engine(FakeEngine):
        def submit(self, requests: list[SegmentRequest]) -> None:
            for request in requests:
                if request.token_ids[0] == 102:
                    raise SegmentEngineError(request.request_id, "token 102 is not in the vocabulary")
            super().submit(requests)

    engine = Engine(endless)
    with pytest.raises(SegmentEngineError, match="token 102") as caught:
        TreeSampler(engine, make_config(), [EOS], decode_words).sample(prompts_of(4), seed=0)
    (note,) = caught.value.__notes__
    assert note.startswith("While sampling prompt 2 of 4 (the first is 0); prompt 2 has 3 tokens and ends in '<102>")
    assert engine.aborted == 1


def test_an_abort_that_fails_too_does_not_hide_the_first_error() -> None:
    class Engine(BrokenEngine):
        def abort(self) -> None:
            raise OSError("engine is dead")

    with pytest.raises(RuntimeError, match="first") as caught:
        TreeSampler(Engine(RuntimeError("first"), "collect"), make_config(), [EOS]).sample(prompts_of(1), seed=0)
    assert "engine is dead" in caught.value.__notes__[0]
    assert "prompt 0 of 1" in caught.value.__notes__[1]


def test_a_callback_that_fails_names_the_prompt() -> None:
    def fail(index: int, tree: SegmentTree) -> None:
        raise OSError("disk full")

    engine = FakeEngine(memoryless(1.0))
    with pytest.raises(OSError, match="disk full") as caught:
        TreeSampler(engine, make_config(), [EOS]).sample(prompts_of(12), seed=0, on_tree=fail)
    assert "While sampling prompt 0 of 12" in caught.value.__notes__[0]
    assert engine.aborted == 1


def test_a_decode_error_aborts_too() -> None:
    engine = FakeEngine(endless)
    with pytest.raises(ZeroDivisionError):
        TreeSampler(engine, make_config(stop_pattern="x"), [EOS], lambda ids: str(1 // 0)).sample([[1]], seed=0)
    assert engine.aborted == 1


@pytest.mark.parametrize("length", [10, 11, 50])
def test_a_prompt_without_room_is_named(length: int, decode_words: Decode) -> None:
    engine = FakeEngine(endless, context_length=10)
    prompts = [[1, 2], [41] * length]
    with pytest.raises(ValueError, match=f"Prompt 1 of this batch, .*<41>.* has {length} tokens .* context of 10"):
        TreeSampler(engine, make_config(), [EOS], decode_words).sample(prompts, seed=0)
    with pytest.raises(ValueError, match=f"Prompt 1 of this batch has {length} tokens"):
        TreeSampler(engine, make_config(), [EOS]).sample(prompts, seed=0)
    assert engine.requests == []


@pytest.mark.parametrize("schedule", ["early", "spread"])
def test_the_context_caps_each_prompts_completions_on_their_own(schedule: str) -> None:
    # Context 20, cap 12: room for 12 (18 left), 5 and 1.
    engine = FakeEngine(endless, context_length=20)
    config = make_config(4, max_completion_length=12, segment_length=3, branch_schedule=schedule)
    trees = TreeSampler(engine, config, [EOS]).sample([[1, 2], [3] * 15, [4] * 19], seed=0)
    for tree, length in zip(trees, [12, 5, 1], strict=True):
        assert len(tree.leaves) == 4
        assert {len(tree.completion_ids(leaf)) for leaf in tree.leaves} == {length}
        assert {tree.nodes[leaf].finish_reason for leaf in tree.leaves} == {"length"}
    assert all(len(request.token_ids) + request.max_tokens <= 20 for request in engine.requests)


def test_the_prompts_and_requests_are_not_changed() -> None:
    prompts = prompts_of(2)
    engine = FakeEngine(memoryless(0.1))
    TreeSampler(engine, make_config(8), [EOS]).sample(prompts, seed=0)
    assert prompts == prompts_of(2)
    assert all(request.token_ids[:3] in prompts for request in engine.requests)


# Statistics


def markov_estimates(
    num_trees: int, cap: int, seed: int = 0, **changes: Any
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Weighted and plain mean over the leaves of each tree, for each statistic of the Markov chain."""
    config = make_config(8, segment_length=4, max_completion_length=cap, **changes)
    trees = TreeSampler(MarkovEngine(1, seed), config, [EOS]).sample([[9]] * num_trees, seed=seed)
    weighted: dict[str, list[float]] = {name: [] for name in MarkovEngine.exact(cap)}
    plain: dict[str, list[float]] = {name: [] for name in weighted}
    for tree in trees:
        observed = [MarkovEngine.observed(tree.completion_ids(leaf)) for leaf in tree.leaves]
        for name in weighted:
            values = [each[name] for each in observed]
            weighted[name].append(sum(w * v for w, v in zip(tree.leaf_weights(), values, strict=True)))
            plain[name].append(mean(values))
    return weighted, plain


@pytest.mark.parametrize("schedule", ["early", "spread"])
@pytest.mark.parametrize("policy", ["uniform", "low_prob", "high_prob", "entropy"])
def test_leaf_weights_undo_the_tilt_of_branching(schedule: str, policy: str) -> None:
    """Without fallback the weighted means are those of independent completions, and the plain ones are not."""
    cap = 40
    weighted, plain = markov_estimates(
        1500,
        cap,
        branch_schedule=schedule,
        branching_policy=policy,
        branching_temperature=0.3,
        fallback_policy="none",
    )
    for name, exact in MarkovEngine.exact(cap).items():
        assert abs(mean(weighted[name]) - exact) < 4 * standard_error(weighted[name]), name
    for name in ("length", "threes"):
        bias = mean(plain[name]) - MarkovEngine.exact(cap)[name]
        assert abs(bias) > 6 * standard_error(plain[name]), name


@pytest.mark.parametrize("schedule", ["early", "spread"])
@pytest.mark.parametrize("fallback", ["random", "root", "low_prob"])
def test_with_fallback_the_weights_undo_most_of_the_tilt(fallback: str, schedule: str) -> None:
    """Fallback adds children once outcomes are known, so a difference remains (docs/method.md has its size)."""
    cap = 40
    weighted, plain = markov_estimates(1500, cap, fallback_policy=fallback, branch_schedule=schedule)
    exact = MarkovEngine.exact(cap)["length"]
    assert abs(mean(weighted["length"]) - exact) < 0.5 * abs(mean(plain["length"]) - exact)


def test_independent_completions_have_the_models_lengths() -> None:
    stop, cap = 0.1, 40
    config = make_config(8, branching_factor=1, segment_length=4, max_completion_length=cap)
    trees = TreeSampler(FakeEngine(memoryless(stop)), config, [EOS]).sample(prompts_of(200), seed=0)
    lengths = [float(tree.nodes[leaf].end) for tree in trees for leaf in tree.leaves]
    assert abs(mean(lengths) - (1 - (1 - stop) ** cap) / stop) < 4 * standard_error(lengths)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: list[float]) -> float:
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values)) / len(values)
