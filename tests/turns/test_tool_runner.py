"""Calls of a turn: their order, failures, time limits and threads."""

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.fake_vllm import until
from tests.support.tools import add, boom, slow_mul
from treepo_trl import SegmentTree
from treepo_trl.sampling.turns import TurnEnd
from treepo_trl.turns import tool_runner
from treepo_trl.turns.conversations import Conversation, ToolTurns
from treepo_trl.turns.tool_runner import EnvironmentLostError, ToolRunner, ToolThreadError, tools_by_name
from treepo_trl.turns.workers import Workers


def calls(*wanted: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in wanted]


TOOLS = tools_by_name([add, slow_mul, boom])


def ended(end: Callable[[], bool], queued: Future[Any], go: threading.Event) -> bool:
    """What `end` returns; what runs goes on once it has cancelled what is queued."""
    with ThreadPoolExecutor(1) as thread:
        try:
            has_ended = thread.submit(end)
            until(queued.cancelled)
        finally:
            go.set()
        return has_ended.result(60)


def test_answers_have_the_order_of_the_calls() -> None:
    wanted = calls(
        ("slow_mul", {"a": 2, "b": 3}),
        ("add", {"a": 1, "b": 1}),
        ("boom", {}),
        ("slow_mul", {"a": 4, "b": 5}),
        ("slow_mul", {"a": 6, "b": 7}),
        ("nope", {}),
        ("add", {"a": 1}),
        ("slow_mul", {"c": 1}),
    )
    found = ToolRunner(2).run([*wanted, {"type": "retrieval", "name": "search"}], TOOLS)
    assert [name for name, _ in found.results] == [
        *("slow_mul", "add", "boom", "slow_mul", "slow_mul", "nope", "add", "slow_mul", "search")
    ]
    values = [value for _, value in found.results]
    assert values[:2] + values[3:5] == [6, 2, 20, 42]
    assert [value["error"] for value in values[2:3] + values[5:6]] == ["out of order", "Tool nope not found."]
    assert "missing 1 required" in values[6]["error"]
    assert "unexpected keyword" in values[7]["error"]
    assert values[8] == {"error": "Unsupported tool call type: retrieval"}
    assert found.num_failures == 5


def test_asynchronous_calls_that_follow_each_other_run_together() -> None:
    running, most = [0], [0]

    async def wait() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.01)
        running[0] -= 1

    ToolRunner(1).run(
        calls(("wait", {}), ("wait", {}), ("add", {"a": 1, "b": 1}), ("wait", {})), {"wait": wait, "add": add}
    )
    assert most == [2]


def test_the_loop_that_is_given_is_used() -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def which() -> bool:
        return asyncio.get_running_loop() is loop

    try:
        assert ToolRunner(1, loop=loop).run(calls(("which", {})), {"which": which}).results == [("which", True)]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_the_first_failure_of_a_tool_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    runner = ToolRunner(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            runner.run(calls(("boom", {}), ("nope", {})), TOOLS)
    (record,) = caplog.records
    assert "'boom' has failed: RuntimeError('out of order')" in record.getMessage()
    assert record.exc_info is not None
    assert "in boom" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_that_takes_too_long(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    let_go = threading.Event()

    def hang() -> None:
        let_go.wait(60)

    async def hang_async() -> None:
        await asyncio.sleep(60)

    tools = {"hang": hang_async if is_async else hang, "add": add}
    try:
        for seconds in (0.02, 0.5, 30.0):  # a machine that stands still has no time for `add` either
            runner = ToolRunner(1, timeout=seconds)
            lost, added = runner.run(calls(("hang", {}), ("add", {"a": 1, "b": 2})), tools).results
            assert lost == ("hang", {"error": f"Tool hang took longer than {seconds} seconds."})
            if added == ("add", 3):
                break
        assert added == ("add", 3)
        assert "'hang' has failed: TimeoutError('Tool hang took longer" in caplog.text
        with pytest.raises(EnvironmentLostError, match="Tool hang took longer"):
            runner.run(calls(("hang", {})), tools, fragile=["hang"])
    finally:
        let_go.set()


def test_a_timeout_of_the_tool_itself_is_an_answer() -> None:
    def give_up() -> None:
        raise TimeoutError("no connection")

    found = ToolRunner(1, timeout=60).run(calls(("give_up", {})), {"give_up": give_up}, fragile=["give_up"])
    assert found.results == [("give_up", {"error": "no connection"})]


def test_a_tool_that_needs_the_main_thread() -> None:
    """The model would see errors and nobody else."""
    database = sqlite3.connect(":memory:")

    def look_up() -> list[Any]:
        return database.execute("select 1").fetchall()

    wanted, tools = calls(("look_up", {})), {"look_up": look_up}
    threads = ToolRunner(2)
    with pytest.raises(
        ToolThreadError, match=r"'look_up' was called in a thread and failed: SQLite.*`tool_workers=0`"
    ):
        threads.submit(lambda: threads.run(wanted, tools)).result(60)
    threads.end()
    here = ToolRunner(0)
    assert here.submit(lambda: here.run(wanted, tools)).result(0).results == [("look_up", [(1,)])]


@pytest.mark.parametrize("has_worked", [False, True])
def test_words_of_the_model_are_no_proof_of_that(has_worked: bool) -> None:
    """An error may repeat what the model asked for; and what has worked in a thread works in threads."""

    def search(text: str) -> str:
        if text == "signal":
            raise ValueError("signal only works in main thread of the main interpreter")
        if text != "cats":
            raise ValueError(f"nothing found for {text}")
        return "found"

    runner = ToolRunner(2)
    asked = ["cats", "signal"] if has_worked else ["the main thread of a story"]
    found = [runner.run(calls(("search", {"text": text})), {"search": search}).results[0][1] for text in asked]
    assert str(found[-1]).startswith("{'error'")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_turn_that_is_given_up_runs_none_of_its_further_calls(
    is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_runner, "_GRACE", 60.0)
    running, go, ran = threading.Event(), threading.Event(), []

    def hang() -> None:
        running.set()
        go.wait(60)

    async def hang_async() -> None:
        running.set()
        await asyncio.sleep(60)

    async def note_async() -> None:
        ran.append("async")

    tools = {"hang": hang_async if is_async else hang, "note": lambda: ran.append("sync"), "note_async": note_async}
    runner = ToolRunner(1)
    future = runner.submit(
        lambda: runner.run(calls(("hang", {}), ("note", {}), ("note_async", {}), ("note", {})), tools)
    )
    assert running.wait(60)
    assert runner.end() if is_async else ended(runner.end, runner.submit(lambda: None), go)
    assert ran == []
    with pytest.raises(CancelledError):
        future.result(0)
    assert runner.run(calls(("note", {})), tools).num_failures == 0  # later ones run


def test_an_asynchronous_tool_that_cancels_itself() -> None:
    async def give_up() -> None:
        raise asyncio.CancelledError

    found = ToolRunner(1).run(calls(("give_up", {}), ("add", {"a": 1, "b": 2})), {"give_up": give_up, "add": add})
    assert found.results == [("give_up", {"error": "The tool was cancelled."}), ("add", 3)]


# Threads


def test_as_many_threads_as_workers() -> None:
    workers, before = Workers(3), set(threading.enumerate())
    together = threading.Barrier(3, timeout=60)

    def work() -> threading.Thread:
        together.wait()
        return threading.current_thread()

    futures = [workers.submit(work) for _ in range(12)]
    started = set(threading.enumerate()) - before
    assert len(started) == 3
    assert {future.result(60) for future in futures} == started
    assert workers.end(60)
    assert workers.submit(lambda: 7).result(60) == 7  # it can go on
    assert workers.end(60)


def test_the_end_cancels_what_waits_and_leaves_no_thread() -> None:
    before = threading.active_count()
    workers, go = Workers(1), threading.Event()
    first, second = workers.submit(lambda: go.wait(60)), workers.submit(lambda: 1)
    until(first.running)
    assert ended(lambda: workers.end(60), second, go)
    assert first.result(0) is True
    assert threading.active_count() <= before


def test_the_end_waits_for_no_call_for_ever() -> None:
    workers, go = Workers(1), threading.Event()
    future = workers.submit(lambda: go.wait(60))
    until(future.running)
    assert not workers.end(0.01)
    go.set()


@pytest.mark.parametrize(("room", "num_tokens"), [(5, 4), (4, 0), (3, 0)])
def test_an_answer_leaves_room_for_a_token_of_the_next_turn(room: int, num_tokens: int) -> None:
    """Four tokens of answer: a path that ends in them would train on nothing behind them."""
    message: dict[str, Any] = {"role": "assistant", "tool_calls": calls(("add", {"a": 1, "b": 1}))}
    conversation = Conversation(schemas=[], tools=dict(TOOLS))
    turns = ToolTurns([conversation], ToolRunner(1), lambda *_: message, lambda _: [1, 2, 3, 4], str, max_turns=9)
    answer = turns.begin(TurnEnd(0, SegmentTree([1]), None, [5], room)).result()
    assert len(answer.token_ids) == num_tokens
    assert len(answer.messages) == (num_tokens > 0)
    assert num_tokens or answer.finish_reason == "overlong"
