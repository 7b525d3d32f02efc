"""Turns that are answered while trees grow: node ids, budgets and text rules do not notice."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import EOS, FakeEngine, ScriptedEngine, memoryless
from tests.support.sampling import arrival, arrivals, decode_words, fingerprint, make_config, prompts_of
from treepo_trl.engines import SegmentResult
from treepo_trl.sampling.branching import fallback_stems
from treepo_trl.sampling.sampler import TreeSampler
from treepo_trl.sampling.tree import SegmentTree
from treepo_trl.sampling.turns import Answer, TurnEnd


ANSWER = 99


@dataclass
class Pending:
    future: Future[Any]
    end: TurnEnd
    length: int

    def result(self) -> Answer:
        self.future.result()
        if self.length < self.end.room:
            return Answer([ANSWER] * self.length, [{"role": "tool"}], {"role": "assistant"}, num_calls=1)
        return Answer([], [], {"role": "assistant"}, "overlong", num_calls=1)


@dataclass
class Turns:
    """Answers the first turns of each path, after a while."""

    most: int = 2
    length: int | None = None
    """Of each answer; `None` for one that depends on the turn."""
    delay: Callable[[], float] = lambda: 0.0
    branches: bool = True
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))
    ends: list[TurnEnd] = field(default_factory=list)
    seen: list[tuple[int, int, Answer]] = field(default_factory=list)
    aborted: int = 0

    def may_branch(self, index: int) -> bool:
        return self.branches

    def begin(self, end: TurnEnd) -> Pending | None:
        self.ends.append(end)
        if end.num_turns >= self.most:
            return None
        length = self.length or 1 + sum(end.token_ids) % 5
        return Pending(self.pool.submit(time.sleep, self.delay()), end, length)

    def stored(self, index: int, node: int, answer: Answer) -> None:
        self.seen.append((index, node, answer))

    def abort(self) -> None:
        self.aborted += 1


def sample(turns: Any, seed: int = 0, stop: float = 0.15, order: random.Random | None = None, **changes: Any) -> Any:
    config = make_config(8, **{"max_completion_length": 60, "segment_length": 6, **changes})
    engine = FakeEngine(memoryless(stop), seed, arrival=order)
    return TreeSampler(engine, config, [EOS]).sample(prompts_of(4), seed=seed, turns=turns)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["early", "spread", "sqrt"]),
    st.sampled_from(["random", "low_prob"]),
    arrivals,
    st.sampled_from([0.05, 0.2, 0.5]),
)
def test_trees_do_not_depend_on_when_answers_come(
    seed: int, schedule: str, fallback: str, arrival_seed: int | None, stop: float
) -> None:
    delays = random.Random(seed)
    changes = {"branch_schedule": schedule, "fallback_policy": fallback}
    at_once = sample(Turns(), seed, stop, **changes)
    later = sample(Turns(delay=lambda: delays.random() / 500), seed, stop, arrival(arrival_seed), **changes)
    assert fingerprint(at_once) == fingerprint(later)
    for tree in at_once:
        check(tree, width=8)


def check(tree: SegmentTree, width: int) -> None:
    """What holds for every tree with answers."""
    assert len(tree.leaves) == width
    assert sum(tree.leaf_weights()) == pytest.approx(1.0)
    for node, each in enumerate(tree.nodes):
        parent = None if each.parent is None else tree.nodes[each.parent]
        if not each.is_sampled:
            # An answer is the only child of a segment that ended its turn, and a sampled token follows it.
            assert parent is not None
            assert parent.is_sampled
            assert parent.children == [node]
            assert parent.token_ids[-1] == EOS
            assert each.finish_reason is None
            assert each.depth == parent.depth
            assert each.children
        elif parent is not None:
            assert parent.token_ids[-1] != EOS or not parent.is_sampled
        assert each.end == len(tree.completion_ids(node)) <= 60
        assert each.sampled_end == sum(tree.sampled_mask(node))
        assert each.num_turns == sum(not tree.nodes[other].is_sampled for other in tree.path(node))
        assert (each.num_calls > 0) == (
            each.finish_reason == "overlong" or (bool(each.children) and not tree.nodes[each.children[0]].is_sampled)
        )
    assert SegmentTree.from_dict(tree.to_dict()).to_dict() == tree.to_dict()


def test_a_handler_is_told_what_was_stored_and_asked_once_per_turn() -> None:
    turns = Turns()
    trees = sample(turns)
    for index, node, answer in turns.seen:
        tree = trees[index]
        assert tree.nodes[node].token_ids[-1] == EOS
        if answer.token_ids:
            (child,) = tree.nodes[node].children
            assert list(tree.nodes[child].token_ids) == answer.token_ids
    ended = sum(EOS in node.token_ids for tree in trees for node in tree.nodes)
    assert len(turns.ends) == ended
    for end in turns.ends:
        before, turn = end.split()
        assert turn[-1] == EOS
        assert EOS not in turn[:-1]
        assert before == end.tree.prompt_ids or before[-1] == ANSWER


def test_paths_part_at_the_prompt_alone_where_they_may_not_branch() -> None:
    for tree in sample(Turns(branches=False)):
        assert len(tree.root_children) == 8
        assert all(len(node.children) <= 1 for node in tree.nodes)


@pytest.mark.parametrize("policy", ["random", "low_prob"])
def test_nor_do_they_part_where_a_budget_leaves_a_tree_fewer_paths_at_first(policy: str) -> None:
    """60 tokens are 2 segments of 30, so a tree starts with 2 of 8 paths; further ones begin at the prompt too."""
    changes = {"max_tree_tokens": 60, "segment_length": 30, "fallback_policy": policy}
    for tree in sample(Turns(branches=False), 1, 0.3, **changes):
        assert all(len(node.children) <= 1 for node in tree.nodes)
        assert len(tree.leaves) > 2


def test_what_a_path_still_needs_is_counted_in_sampled_tokens() -> None:
    """
    4 of 16 expected tokens are sampled, and an answer of 8 stands behind them: 12 are left, of which a budget of
    32 - 4 pays for two paths. With the answer there would be 4 left, and 28 / 4 = 7 paths be opened.
    """

    shape = {"max_tree_tokens": 32, "expected_completion_length": 16, "fallback_policy": "none"}
    shape |= {"initial_branching_factor": 1, "branching_factor": 8}
    config = make_config(8, max_completion_length=32, segment_length=4, **shape)
    engine = ScriptedEngine([[5, 6, 7, EOS]] + [[8, EOS]] * 8)
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[1]], 0, turns=Turns(most=1, length=8))
    assert len(tree.leaves) == 2


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from(["random", "low_prob"]), st.sampled_from(["finished", "all"]))
def test_no_fallback_starts_at_a_call(seed: int, policy: Any, candidates: Any) -> None:
    tree = sample(Turns(), seed)[0]
    for stem in fallback_stems(tree, 20, 2, policy, random.Random(seed), candidates):
        if stem is not None and tree.nodes[stem].is_sampled:
            assert tree.nodes[stem].token_ids[-1] != EOS


# Text rules


def test_text_rules_see_the_turn_alone() -> None:
    """The pattern is in the answer, and across the end of the first turn: neither ends the path."""

    config = make_config(1, max_completion_length=40, segment_length=4, stop_pattern="<99>|<7><8>")
    engine = ScriptedEngine([[7, EOS], [8, 5, 6, 5], [7, 8, 9, 9]])
    (tree,) = TreeSampler(engine, config, [EOS], decode_words).sample([[1]], seed=0, turns=Turns(most=1, length=3))
    assert tree.completion_ids(tree.leaves[0]) == [7, EOS, ANSWER, ANSWER, ANSWER, 8, 5, 6, 5, 7, 8]
    assert tree.nodes[tree.leaves[0]].finish_reason == "pattern"


def test_a_pattern_before_the_end_of_a_turn_calls_nothing() -> None:
    turns = Turns()
    config = make_config(1, max_completion_length=40, segment_length=4, stop_pattern="<7>")
    (tree,) = TreeSampler(ScriptedEngine([[5, 7, 8, EOS]]), config, [EOS], decode_words).sample([[1]], 0, turns=turns)
    assert tree.nodes[tree.leaves[0]].finish_reason == "pattern"
    assert turns.ends == []


def test_a_turn_that_the_cap_cuts_calls_nothing() -> None:
    turns = Turns()
    config = make_config(1, max_completion_length=4, segment_length=4)
    (tree,) = TreeSampler(ScriptedEngine([[5, 7, 8, 9]]), config, [EOS]).sample([[1]], 0, turns=turns)
    assert tree.nodes[tree.leaves[0]].finish_reason == "length"
    assert turns.ends == []


@pytest.mark.parametrize(("length", "reason"), [(2, "length"), (3, "overlong")])
def test_an_answer_leaves_room_for_a_token(length: int, reason: str) -> None:
    """Of 6 tokens the turn has 3, EOS on the last: 2 tokens of an answer leave one."""
    turns = Turns(most=1, length=length)
    config = make_config(1, max_completion_length=6, segment_length=4)
    engine = ScriptedEngine([[5, 6, EOS], [8]])
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[1]], 0, turns=turns)
    assert tree.nodes[tree.leaves[0]].finish_reason == reason
    assert turns.ends[0].room == 3


def test_spread_counts_sampled_tokens() -> None:
    """
    Turns of 4 tokens, answers of 8, 16 expected: the next level ends at the 8th sampled token, so it may hold
    8 ** (8 / 16) = 2.8 paths, rounded up 3. With the answers it would end at 16, and 2 * 2 = 4 be opened.
    """

    shape = {"branch_schedule": "spread", "expected_completion_length": 16, "fallback_policy": "none"}
    config = make_config(8, max_completion_length=40, segment_length=4, **shape)
    engine = ScriptedEngine([[5, 6, 7, EOS]] * 2 + [[8, EOS]] * 4)
    (tree,) = TreeSampler(engine, config, [EOS]).sample([[1]], 0, turns=Turns(most=1, length=8))
    assert len(tree.leaves) == 3
    assert (tree.num_unique_tokens, tree.num_answer_tokens, tree.num_leaf_tokens) == (4 + 4 + 3 * 2, 16, 3 * 6)
    assert tree.mean_length() == 6.0


# Waiting


class Gate(Turns):
    """The first turn of tree 0 is answered when all other trees are done."""

    def __init__(self) -> None:
        super().__init__(most=1)
        self.open = threading.Event()

    def begin(self, end: TurnEnd) -> Pending | None:
        if end.index != 0 or end.num_turns:
            return super().begin(end)
        return Pending(self.pool.submit(self.open.wait, 20), end, 2)


def test_a_slow_tool_on_one_tree_does_not_delay_the_others() -> None:
    turns, done = Gate(), []

    def on_tree(index: int, _: SegmentTree) -> None:
        done.append(index)
        if len(done) == 3:
            assert 0 not in done
            turns.open.set()

    config = make_config(4, max_completion_length=40, segment_length=6)
    sampler = TreeSampler(FakeEngine(memoryless(0.3)), config, [EOS])
    sampler.sample(prompts_of(4), 0, turns=turns, on_tree=on_tree)
    assert sorted(done) == [0, 1, 2, 3]
    assert sampler.stats.tool_seconds > 0


def test_an_answer_wakes_the_engine() -> None:
    """The engine is asked to stop once a level is complete, and its other requests go on."""
    woken = []

    class Engine(FakeEngine):
        """Holds everything back until it is woken, at first."""

        def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
            assert wake is not None
            if self._pending and any(request.token_ids[0] == 101 for request in self._pending) and not woken:
                mine = [request for request in self._pending if request.token_ids[0] == 101]
                others = [request for request in self._pending if request.token_ids[0] != 101]
                if others:
                    self._pending = others
                    results = super().collect()
                    self._pending += mine
                    return results
                until = time.monotonic() + 120
                while not wake():
                    assert time.monotonic() < until
                    time.sleep(0.001)
                woken.append(len(mine))
                return []
            return super().collect()

    config = make_config(2, max_completion_length=40, segment_length=6)
    sampler = TreeSampler(Engine(lambda path, rng: EOS), config, [EOS])
    trees = sampler.sample(prompts_of(2), 0, turns=Turns(most=1, delay=lambda: 0.02))
    assert woken
    assert [len(tree.leaves) for tree in trees] == [2, 2]


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_an_error_of_an_answer_ends_the_rest(error: BaseException) -> None:
    class Failing(Turns):
        def begin(self, end: TurnEnd) -> Pending | None:
            pending = super().begin(end)
            if pending is not None and end.index == 1:
                pending.future = Future()
                pending.future.set_exception(error)
            return pending

    turns = Failing()
    config = make_config(4, max_completion_length=40, segment_length=6)
    engine = FakeEngine(memoryless(0.3))
    with pytest.raises(type(error)) as caught:
        TreeSampler(engine, config, [EOS]).sample(prompts_of(3), 0, turns=turns)
    assert (turns.aborted, engine.aborted) == (1, 1)
    assert "While sampling prompt 1 of 3" in caught.value.__notes__[-1]
