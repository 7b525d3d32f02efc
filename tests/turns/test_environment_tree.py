"""Environments of one tree, without a training: what its paths get, and what goes back to the pool."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.environments import Counter, Forking, RandomForking, RandomReset, fresh
from treepo_trl import SegmentTree
from treepo_trl.turns import EnvironmentPool, EnvironmentTree, ToolRunner
from treepo_trl.turns.environments import Forking as ForkingMode
from treepo_trl.turns.tool_runner import EnvironmentLostError


def environments(cls: Any, forking: ForkingMode, **row: Any) -> EnvironmentTree:
    """The environments of a tree, after its reset."""
    made = EnvironmentTree(EnvironmentPool(cls, []), forking, ToolRunner(4), [])
    made.observation({"start": 0, **row})
    return made


def step(n: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "step", "arguments": {"n": n}}}]


@pytest.mark.parametrize("forking", ["replay", "none"])
def test_a_reset_that_uses_up_its_row(forking: ForkingMode) -> None:
    """Each environment gets the row as it is in the dataset."""

    class Cards(Counter):
        def reset(self, start: int, **kwargs: Any) -> str:
            self.deck = kwargs["deck"]
            return super().reset(start) + f" You hold {self.deck.pop()}."

    deck = [1, 2, 3]
    tree = environments(fresh(Cards), forking, deck=deck)
    tree.check_reset()
    assert deck == [1, 2, 3]


def test_a_replay_compares_what_was_answered_then() -> None:
    """An answer may be an object that the environment goes on to change."""

    class Stock(Counter):
        def reset(self, start: int, **kwargs: Any) -> str:
            self.stock = {"apples": 0}
            return super().reset(start)

        def step(self, n: int) -> Any:
            """
            Adds to the stock.

            Args:
                n: How much.
            """
            self.stock["apples"] += n
            return self.stock

    tree = environments(fresh(Stock), "replay")
    tree.keep(0, tree.execute((), step(2)))
    tree.keep(1, tree.execute((0,), step(3)))
    again = tree.execute((0,), step(4))  # the first one has moved on
    assert again.found.results == [("step", {"apples": 6})]


def test_a_replay_runs_the_calls_on_the_environment_alone() -> None:
    """Another tool of the same turn has given its answer; it may cost, and may not repeat itself."""
    asked: list[str] = []

    def ask(text: str) -> int:
        """
        Asks somebody.

        Args:
            text: What.
        """
        asked.append(text)
        return len(asked)

    tree = environments(fresh(Counter), "replay")
    tree.standalone = [ask]
    turn = [*step(2), {"type": "function", "function": {"name": "ask", "arguments": {"text": "how"}}}]
    tree.keep(0, tree.execute((), turn))
    tree.keep(1, tree.execute((0,), step(3)))
    assert tree.execute((0,), step(4)).found.results == [("step", "It shows 6.")]
    assert asked == ["how"]
    assert tree.pool.counts.num_replayed_calls == 1


def test_rows_of_a_tree_share_no_observation() -> None:
    class Board(Counter):
        def reset(self, start: int, **kwargs: Any) -> Any:
            super().reset(start)
            return [{"type": "text", "text": "A board."}]

    tree = environments(fresh(Board), "none")
    first: Any = tree.observation({})
    first[0]["text"] += " Changed."
    assert tree.observation({}) == [{"type": "text", "text": "A board."}]


class Selfish(Counter):
    def _fork(self) -> Any:
        return self


class Forgetful(Counter):
    def _fork(self) -> None:
        pass


@pytest.mark.parametrize(("cls", "returned"), [(Selfish, "itself"), (Forgetful, "None")])
def test_a_fork_that_is_none(cls: Any, returned: str) -> None:
    tree = environments(fresh(cls), "fork")
    with pytest.raises(TypeError, match=rf"`_fork` of {cls.__name__} has returned {returned}.*another {cls.__name__}"):
        tree.execute((), step(1))


def test_a_slow_fork_holds_up_nothing_else() -> None:
    """Neither the paths that are done, nor the end of the batch."""
    forking, go = threading.Event(), threading.Event()

    class Slow(Forking):
        def _fork(self) -> Any:
            if self.value == 2:
                forking.set()
                go.wait(120)
            return super()._fork()

    tree = environments(fresh(Slow), "fork")
    tree.keep(0, tree.execute((), step(2)))
    with ThreadPoolExecutor(2) as threads:
        try:
            slow = threads.submit(tree.execute, (0,), step(1))
            assert forking.wait(60)
            other = threads.submit(lambda: tree.keep(1, tree.execute((), step(5))))
            other.result(60)
            threads.submit(tree.release, True).result(60)
        finally:
            go.set()
        assert slow.result(60).found.results == [("step", "It shows 3.")]


def test_forks_of_one_environment_are_made_one_after_another() -> None:
    running, most = [0], [0]

    class Fragile(Forking):
        def _fork(self) -> Any:
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.005)
            running[0] -= 1
            return super()._fork()

    tree = environments(fresh(Fragile), "fork")
    with ThreadPoolExecutor(4) as threads:
        assert len({id(each.environment) for each in threads.map(lambda n: tree.execute((), step(n)), range(8))}) == 8
    assert most == [1]
    assert tree.pool.counts.num_forks == 8


def test_a_lost_path_of_a_random_reset_gets_a_stand_in() -> None:
    """Its task is another one, and nobody rewards it."""
    tree, paths = environments(fresh(RandomForking), "fork"), SegmentTree([1])
    tree.lose(paths.add(None, [5], finish_reason="stop"))
    assert isinstance(tree.leaf_environment(paths, 0), RandomForking)
    assert paths.nodes[0].finish_reason == "timeout"


def test_a_replay_that_hangs() -> None:
    """Its leaves cannot be scored, and the environment that it has left in a call is not used again."""
    hangs, go = [False], threading.Event()

    class Hanging(Counter):
        def step(self, n: int) -> str:
            """
            Adds to the counter, or hangs.

            Args:
                n: How much.
            """
            if hangs[0]:
                go.wait(60)
            return super().step(n)

    environment = fresh(Hanging)
    tree = environments(environment, "replay")
    tree.keep(0, tree.execute((), step(2)))
    tree.keep(1, tree.execute((0,), step(3)))
    two = SegmentTree([1])
    first = two.add(None, [5])
    two.add(first, [5], finish_reason="stop")
    ends = [two.add(first, [6], finish_reason="stop"), two.add(first, [7], finish_reason="stop")]
    hangs[0], tree.runner = True, ToolRunner(4, 0.1)  # for calls that hang alone
    try:
        with pytest.raises(EnvironmentLostError):
            tree.execute((0,), step(4))
        for leaf in ends:
            assert isinstance(tree.leaf_environment(two, leaf), environment)
            assert two.nodes[leaf].finish_reason == "timeout"
        assert tree.leaf_environment(two, 1).value == 5  # pyright: ignore[reportAttributeAccessIssue]
        assert two.nodes[1].finish_reason == "stop"
        tree.release()
    finally:
        go.set()
    left_in_a_call = 2  # of the path that went on, and of the first leaf
    assert len(tree.pool._idle) == len(environment.made) - left_in_a_call


class Oracle:
    """Another riddle each time, and nothing that a path could change."""

    number = 0

    def reset(self, **kwargs: Any) -> str:
        Oracle.number += 1
        return f"Riddle {Oracle.number}"


def test_a_random_reset_of_what_no_call_changes() -> None:
    """One reset for all paths, which may part anywhere: nothing needs a fork."""
    tree = environments(Oracle, "none")
    tree.check_reset()
    assert tree.can_part
    assert not environments(fresh(RandomReset), "none").can_part
