"""The sampler's laws over engines without a model: what may never happen, whatever the engine answers and when."""

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import EOS, FakeEngine, RecordingEngine, ScriptedEngine, endless, memoryless
from tests.support.sampling import (
    arrival,
    arrivals,
    configs,
    fingerprint,
    limits,
    make_config,
    prompts_of,
    stop_probabilities,
    tree_of,
    trees_of,
)
from treepo_trl.engines import SegmentRequest, SegmentResult
from treepo_trl.sampling.branching import FallbackPolicy
from treepo_trl.sampling.config import TreeSamplingConfig
from treepo_trl.sampling.sampler import TreeSampler


# Laws


@settings(deadline=None)
@given(
    configs(),
    stop_probabilities,
    arrivals,
    st.integers(0, 9),
    st.sampled_from([*map(prompts_of, (1, 4)), [[5, 6]] * 3]),
    limits(),
)
def test_every_tree_is_complete_and_made_of_what_the_engine_returned(
    config: TreeSamplingConfig,
    stop: float,
    arrival_seed: int | None,
    seed: int,
    prompts: list[list[int]],
    limits: dict[str, Any],
) -> None:
    engine = FakeEngine(memoryless(stop), seed=seed, arrival=arrival(arrival_seed), **limits)
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
    # Requests name their tree, and every tree is ended once, when nothing of it is in flight.
    assert all(request.token_ids[: len(prompts[0])] == prompts[request.tree] for request in engine.requests)
    assert sorted(engine.ended) == list(range(len(prompts)))
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
    trees_of(engine, config, num_prompts)

    lengths = {request.request_id: len(request.token_ids) - 3 for request in engine.requests}
    owner = engine.owners
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
        assert all(finished[tree] + flying[tree] <= config.num_generations for tree in owner.values())


@settings(deadline=None, max_examples=60)
@given(configs(), stop_probabilities, st.integers(0, 99), limits(), st.sampled_from([0, 7, "7/3/0"]))
def test_same_seed_gives_the_same_trees_whatever_the_order_of_arrival_and_the_number_of_slots(
    config: TreeSamplingConfig, stop: float, arrival_seed: int, limits: dict[str, Any], seed: int | str
) -> None:
    free = {"reports_entropies": True, "block_size": limits["block_size"]}
    runs = [
        trees_of(FakeEngine(memoryless(stop), arrival=arrival(order), **kwargs), config, seed=seed)
        for order, kwargs in ((None, free), (arrival_seed, free), (arrival_seed + 1, limits))
    ]
    assert fingerprint(runs[0]) == fingerprint(runs[1]) == fingerprint(runs[2])


def test_the_seed_matters() -> None:
    config = make_config(16, initial_branching_factor=[1, 16])
    trees = [trees_of(FakeEngine(memoryless(0.05)), config, seed=seed) for seed in (0, 1)]
    assert fingerprint(trees[0]) != fingerprint(trees[1])


def test_a_prompts_tree_does_not_depend_on_the_prompts_behind_it() -> None:
    config = make_config(8, initial_branching_factor=[1, 8])
    alone, together = (trees_of(FakeEngine(memoryless(0.1)), config, count) for count in (1, 3))
    assert fingerprint(alone) == fingerprint(together[:1])


def test_no_prompts_give_no_trees_and_ask_the_engine_for_nothing() -> None:
    engine = RecordingEngine(endless)
    assert trees_of(engine, make_config(), []) == []
    assert engine.events == []


# Levels


def test_trees_do_not_wait_for_one_another() -> None:
    # Nothing of the first prompt arrives while anything else is pending.
    config = make_config(8, branching_factor=2, segment_length=3, max_completion_length=12)
    engine = RecordingEngine(endless, withhold=lambda request: request.token_ids[0] == 100)
    trees_of(engine, config)
    arrived = [engine.owners[result.request_id] for result in engine.results]
    # Segments of a tree: 2 + 4 + 8 + 8 = 22. All 44 of the others come before the first of the slow one.
    assert arrived == [owner for owner in arrived if owner != 100] + [100] * 22
    assert len(arrived) == 66


def test_the_levels_of_endless_paths_double_until_the_width() -> None:
    engine = RecordingEngine(endless)
    tree = tree_of(engine, 16, segment_length=2)
    assert engine.levels == [2, 4, 8, 16, 16, 16]  # 6 levels of 2 tokens are 12
    assert Counter(node.finish_reason for node in tree.nodes) == {None: 2 + 4 + 8 + 16 + 16, "length": 16}


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
    sampler.engine = engine
    (tree,) = sampler.sample([[7]], seed=0)
    assert sampler.stats.num_fallback_leaves == 2
    assert [tree.nodes[leaf].depth for leaf in tree.leaves] == [0, 0, 1, 1]


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


def test_a_range_draws_different_numbers_for_different_prompts() -> None:
    trees = trees_of(FakeEngine(endless), make_config(16, initial_branching_factor=[2, 8]), 40)
    first_levels = [len(tree.root_children) for tree in trees]  # endless paths: no fallback adds children to the root
    assert set(first_levels) == set(range(2, 9))


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
    tree = tree_of(engine, 8, branching_policy="entropy", branching_temperature=0.1)
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
        (tree,) = trees_of(engine, config, 1, progress=progress)
        counts.append([len(tree.nodes[node].children) for node in (0, 1)])
    assert counts == [[2, 2], [1, 3]]


def test_entropy_needs_an_engine_that_reports_it() -> None:
    with pytest.raises(ValueError, match=r"`branching_policy='entropy'` needs .*with_entropies=True"):
        TreeSampler(FakeEngine(endless), make_config(branching_policy="entropy"), [EOS])


def test_entropies_of_tokens_that_are_cut_do_not_count() -> None:
    class Engine(ScriptedEngine):
        reports_entropies = True

        def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
            return [
                SegmentResult(r.request_id, r.token_ids, r.logprobs, r.finish_reason, [1.0, 3.0, 100.0])
                for r in super().collect(wake)
            ]

    engine = Engine([[5, EOS, 7], [5, 6, EOS]])
    tree = tree_of(engine, 2)
    assert [node.entropy for node in tree.nodes] == pytest.approx([2.0, 104 / 3])


# Schedules


def test_spread_counts_finished_paths_as_open_ones() -> None:
    # W = 8, cap 12, l = 2: widths 2, 2, 3, 4, 6, 8. One path ends in the first segment, so the levels behind it hold
    # one path less: 1, 2, 3, 5, 7.
    engine = ScriptedEngine([[EOS], *[[1, 1]] * 200])
    tree = tree_of(engine, 8, segment_length=2, max_completion_length=12, branch_schedule="spread")
    depths = Counter(node.depth for node in tree.nodes)
    assert [depths[depth] for depth in range(6)] == [2, 1, 2, 3, 5, 7]


def test_spread_follows_the_expected_length_and_a_prompts_own_room() -> None:
    def levels(expected: int | None = None, prompt_length: int = 3, **changes: Any) -> list[int]:
        engine = RecordingEngine(endless, context_length=20)
        config = make_config(8, segment_length=2, max_completion_length=12, branch_schedule="spread", **changes)
        (tree,) = trees_of(engine, config, prompts_of(1, prompt_length), expected_length=expected)
        assert len(tree.leaves) == 8
        return engine.levels

    assert levels() == [2, 2, 3, 4, 6, 8]  # 8 ** (d/6)
    assert levels(6) == [2, 4, 8, 8, 8, 8]  # 8 ** (d/3): 2, 4, 8
    assert levels(5) == [2, 4, 8, 8, 8, 8]  # 8 ** (4/5) = 5.3, but a level at most doubles
    assert levels(100) == levels()  # never beyond the cap
    assert levels(6, expected_completion_length=12) == levels()  # what the user says goes first
    assert levels(prompt_length=14) == [2, 4, 8]  # 6 tokens of room: three segments of 2


@settings(deadline=None)
@given(
    configs(),
    stop_probabilities,
    st.none() | st.integers(0, 60),
    st.sampled_from([None, 3, 20]),
    st.integers(1, 3),
    st.sampled_from(get_args(FallbackPolicy)),
)
def test_without_fallback_or_tokens_a_tree_may_lack_leaves_but_ends_and_keeps_its_budget(
    config: TreeSamplingConfig, stop: float, extra: int | None, expected: int | None, num_prompts: int, fallback: str
) -> None:
    config.max_tree_tokens = None if extra is None else config.max_completion_length + extra
    config.fallback_policy = fallback
    sampler = TreeSampler(FakeEngine(memoryless(stop), reports_entropies=True), config, [EOS])
    trees = sampler.sample(prompts_of(num_prompts), seed=0, expected_length=expected)
    for tree in trees:
        assert 1 <= len(tree.leaves) <= config.num_generations
        assert config.max_tree_tokens is None or tree.num_unique_tokens <= config.max_tree_tokens
        assert sum(tree.leaf_weights()) == pytest.approx(1.0)  # no path is left open
    assert sampler.stats.num_decoded_tokens == sum(tree.num_unique_tokens for tree in trees)
    most = 0 if fallback == "none" else sum(len(tree.leaves) for tree in trees)
    assert sampler.stats.num_fallback_leaves <= most
