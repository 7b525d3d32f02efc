"""Servers that die, come back, are silent, refuse or answer nonsense in the middle of a batch."""

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from tests.support.fake_vllm import (
    Act,
    FakeVLLM,
    at_random,
    engine_of,
    fake_servers,
    path_determined,
    scripted,
    set_deadline,
    until,
)
from tests.support.fakes import EOS, FakeEngine, memoryless
from tests.support.sampling import fingerprint, make_config, prompts_of, trees_of
from treepo_trl import SegmentTree, TreeSampler
from treepo_trl.engines import SegmentEngineError, SegmentRequest, SegmentResult
from treepo_trl.servers import server as server_module
from treepo_trl.servers.connection import GENERATE, ServerConnection, ServerLostError, run_in_loop
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.servers.versions import ServedPolicy


CONFIG = make_config(8, max_completion_length=40, segment_length=8)
Question = Callable[[ServerConnection], Coroutine[Any, Any, None]]
LOST: list[Act] = [500, 502, 503, "close", "abort"]


def expected_trees(count: int) -> list[SegmentTree]:
    """The trees that an engine in this process grows of the same segments."""

    class PathEngine(FakeEngine):
        def answer(self, request: SegmentRequest) -> SegmentResult:
            return path_determined()(request)

    return trees_of(PathEngine(memoryless(0.0), slots=16, block_size=16, context_length=4096), CONFIG, count)


def same_trees(trees: list[SegmentTree]) -> bool:
    return fingerprint(trees) == fingerprint(expected_trees(len(trees)))


def engine_that_soon_fails(servers: list[FakeVLLM], **options: Any) -> VLLMServerEngine:
    """After 0.1 s without a server; its requests have as long as they need."""
    engine = engine_of(servers, **options)
    engine.fleet.timeout = 0.1
    return engine


async def nothing(server: ServerConnection) -> None:
    return


class Given(ServedPolicy):
    """What a server that is back is given, and how one that is idle is checked."""

    def __init__(self, load: Question, check: Question = nothing) -> None:
        self._load, self._check = load, check

    async def load(self, server: ServerConnection) -> None:
        await self._load(server)

    async def check_has(self, server: ServerConnection, name: str | None) -> None:
        await self._check(server)


def requests_of(count: int, tokens: int = 4) -> list[SegmentRequest]:
    return [SegmentRequest(i, [100 + i] * 3, tokens, tree=i) for i in range(count)]


# Lost


@pytest.fixture
def many_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of them comes after a minute where the first comes after 0.1 s."""
    monkeypatch.setattr(server_module, "MOST_DEADLINES", 600)


@pytest.mark.parametrize("act", ["die", *LOST])
def test_a_server_lost_in_mid_batch_costs_no_segment(act: Act) -> None:
    with fake_servers(2, path_determined()) as (first, second):
        first.script = scripted(*["answer"] * 9, act)
        engine = engine_of([first, second])
        sampler = TreeSampler(engine, CONFIG, [EOS])
        trees = sampler.sample(prompts_of(6), seed=0)
        assert same_trees(trees)
        assert engine.fleet.num_lost == 1
        assert engine.num_resent >= 1
        # Finished segments stay: only what was open is asked for again.
        num_asked = len(first.bodies) + len(second.bodies)
        assert sampler.stats.num_segments <= num_asked <= sampler.stats.num_segments + engine.num_resent
        engine.close()


def test_trees_are_the_same_whatever_fails(rng: random.Random) -> None:
    with fake_servers(3, path_determined()) as servers:
        for server in servers:
            server.script = at_random(rng, *["answer"] * 60, *LOST)
        engine = engine_of(servers)
        assert same_trees(trees_of(engine, CONFIG, 12))
        assert engine.fleet.num_lost > 0
        engine.close()


@pytest.mark.parametrize(
    ("health", "num_deadlines", "told"), [(503, 600, "0.1"), (200, server_module.MOST_DEADLINES, "0.4")]
)
def test_a_silent_server_is_lost_with_all_that_it_has(
    health: int, num_deadlines: int, told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its deadline if it is not healthy, else after four of them: `/health` of a server that hangs may answer."""
    monkeypatch.setattr(server_module, "MOST_DEADLINES", num_deadlines)
    with fake_servers(2, path_determined()) as (first, second):
        engine = engine_of([first, second])
        first.script, first.health = scripted(then="silence"), health
        engine.fleet.servers[0].connection.timeout = 0.1
        results = list(engine.complete(requests_of(8)))
        assert sorted(result.request_id for result in results) == list(range(8))
        assert (engine.fleet.num_lost, engine.num_resent) == (1, 4)
        until(lambda: first.num_running == 0)
        engine.close()
        assert f"{first.url} has not answered POST {GENERATE} for {told} s." in caplog.text


@pytest.mark.usefixtures("many_deadlines")
def test_a_healthy_server_is_waited_for_beyond_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    with fake_servers(1, path_determined()) as (server,):
        server.script = scripted(then="late")
        engine = engine_of([server])
        set_deadline(engine, 0.1)
        assert len(list(engine.complete(requests_of(4)))) == 4
        assert engine.fleet.num_lost == engine.num_resent == 0
        assert len(server.bodies) == 4  # each was sent once
        (told,) = (record.getMessage() for record in caplog.records)
        assert f"The vLLM server at {server.url} has not answered a request for 0.1 s (`vllm_server_timeout`)" in told


def test_what_waits_on_a_lost_server_is_sent_again_before_its_deadline() -> None:
    with fake_servers(2, path_determined()) as (first, second):
        first.script = scripted("silence", "silence", "silence", 500)
        engine = engine_of([first, second])  # the deadline of minutes never comes here
        assert len(list(engine.complete(requests_of(8)))) == 8
        assert (engine.fleet.num_lost, engine.num_resent) == (1, 4)
        until(lambda: first.num_running == 0)
        engine.close()


def test_a_slow_server_is_no_lost_one() -> None:
    with fake_servers(1) as (server,):
        server.seconds = 0.3
        engine = engine_of([server], timeout=60.0)
        assert len(list(engine.complete(requests_of(4)))) == 4
        assert engine.fleet.num_lost == 0


def test_a_request_that_costs_server_after_server_is_given_up() -> None:
    with fake_servers(2, path_determined()) as servers:
        for server in servers:
            server.script = lambda body: 500 if body["token_ids"][0] == 102 else "answer"
        engine = engine_of(servers)
        with pytest.raises(SegmentEngineError, match=r"5 times a server was lost with it.*scripted 500") as error:
            list(engine.complete(requests_of(4)))
        assert error.value.request_id == 2
        assert sum(server.trees.count(102) for server in servers) == 5
        engine.close()


def test_without_a_server_it_fails_and_names_them_all() -> None:
    with fake_servers(2) as (first, second):
        engine = engine_that_soon_fails([first, second])
        first.die()
        second.script = scripted(then="die")
        with pytest.raises(RuntimeError, match=r"No vLLM server has answered for 0\.1 s") as error:
            TreeSampler(engine, CONFIG, [EOS]).sample(prompts_of(3), seed=0)
        for server in (first, second):
            assert server.url in str(error.value)
        assert "last checkpoint" in str(error.value)
        assert engine.fleet.living() == []
        assert engine.num_slots(1) == 16  # of those that requests wait for

        # Once they are back, the same engine goes on.
        second.script = None
        for server in (first, second):
            server.start()
        until(lambda: len(engine.fleet.living()) == 2)
        assert len(trees_of(engine, CONFIG, 2)) == 2
        engine.close()


# Back


def test_a_server_that_is_back_is_checked_before_it_gets_new_trees() -> None:
    checked: list[tuple[str, int]] = []
    with fake_servers(2, path_determined()) as (first, second):

        async def check(connection: ServerConnection) -> None:
            assert await connection.is_healthy()  # it may ask the server
            checked.append((connection.url, len(first.bodies)))

        engine = engine_of([first, second], policy=Given(check))
        first.script = scripted("answer", "answer", "die")
        list(engine.complete(requests_of(6)))
        sent = len(first.bodies)
        assert checked == []
        assert [server.url for server in engine.fleet.living()] == [second.url]
        assert engine.num_slots(1) == 8
        assert engine.num_cache_tokens == 16_000

        first.script = None
        first.start()
        until(lambda: len(engine.fleet.living()) == 2)
        assert checked == [(first.url, sent)]
        assert engine.num_slots(1) == 16
        list(engine.complete(requests_of(6)))
        assert len(first.bodies) == sent + 3
        engine.close()


def test_a_server_that_is_back_may_have_other_ranks() -> None:
    with fake_servers(2) as (first, second):
        first.changes = {"parallel_config": {"data_parallel_size": 2}}
        engine = engine_of([first, second])
        first.script = scripted("die")
        list(engine.complete(requests_of(2)))
        first.changes = {}
        first.start()
        until(lambda: len(engine.fleet.living()) == 2)
        first.headers.clear()
        list(engine.complete(requests_of(4)))
        assert ["x-data-parallel-rank" in each for each in first.headers] == [False, False]
        engine.close()


def test_trees_that_have_moved_stay() -> None:
    with fake_servers(2) as (first, second):
        engine = engine_of([first, second])
        first.script = lambda body: "die"
        engine.submit(requests_of(4))
        collected: list[SegmentResult] = []
        while len(collected) < 4:
            collected += engine.collect()
        first.script = None
        first.start()
        until(lambda: len(engine.fleet.living()) == 2)
        first.bodies.clear()
        second.bodies.clear()
        list(engine.complete([*requests_of(4), SegmentRequest(4, [104], 4, tree=4)]))
        assert sorted(second.trees) == [100, 101, 102, 103]
        assert first.trees == [104]
        engine.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_config": {"max_model_len": 64}}, "context of 64 and cache blocks of 16"),
        ({"cache_config": {"block_size": 128}}, "cache blocks of 128 tokens; this training has 4096 and 16"),
        (None, "another adapter"),
    ],
)
def test_a_server_that_is_back_and_does_not_fit_stays_out(changes: Any, words: str) -> None:
    async def check(connection: ServerConnection) -> None:
        raise ValueError("another adapter")

    with fake_servers(2, path_determined()) as (first, second):
        engine = engine_that_soon_fails([first, second], policy=Given(check))
        first.script = scripted("die")
        list(engine.complete(requests_of(2)))
        first.changes = changes or {}
        first.bodies.clear()
        first.start()
        until(lambda: words in engine.fleet.servers[0].error)
        assert same_trees(trees_of(engine, CONFIG, 4))
        assert first.bodies == []
        second.script = scripted(then="die")
        with pytest.raises(RuntimeError, match=words):
            list(engine.complete(requests_of(2)))
        engine.close()


# Started anew, without an open request that would have shown it


class Policy(ServedPolicy):
    """Fake servers that have a policy until they forget it."""

    def __init__(self, servers: list[FakeVLLM]) -> None:
        self.having = {server.url for server in servers}
        self.given: list[str] = []
        self.asked: list[str] = []
        self.answered_without: list[str] = []
        for server in servers:
            server.script = partial(self._answer, server.url)

    def _answer(self, url: str, body: dict[str, Any]) -> Act:
        if url not in self.having:
            self.answered_without.append(url)
        return "answer"

    async def load(self, server: ServerConnection) -> None:
        self.given.append(server.url)
        self.having.add(server.url)

    async def check_has(self, server: ServerConnection, name: str | None) -> None:
        self.asked.append(server.url)
        if server.url not in self.having:
            raise ServerLostError(f"{server.url} has forgotten.")


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_has_lost_the_adapter_gets_it_again(count: int) -> None:
    """vLLM answers 404 for the name of an adapter that it does not have."""
    with fake_servers(count, path_determined()) as servers:
        policy = Policy(servers)
        for server in servers:
            server.script = lambda body, url=server.url: "answer" if url in policy.having else 404
        engine = engine_of(servers, policy=Given(policy.load), model="adapter-7")
        list(engine.complete(requests_of(8)))
        policy.having.remove(servers[0].url)
        assert same_trees(trees_of(engine, CONFIG, 6))
        until(lambda: len(engine.fleet.living()) == count)
        assert policy.given == [servers[0].url]
        assert engine.fleet.num_lost == 1
        engine.close()


def test_an_adapter_that_no_server_gets_is_an_error() -> None:
    with fake_servers(1) as (server,):
        server.script = scripted(then=404)
        engine = engine_of([server], policy=Given(nothing), model="adapter-7")
        with pytest.raises(SegmentEngineError, match=r"for the model 'adapter-7': 5 times .* has status 404"):
            list(engine.complete(requests_of(1)))
        engine.close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_with_nothing_open_is_asked_before_it_gets_a_request(count: int) -> None:
    with fake_servers(count, path_determined()) as servers:
        policy = Policy(servers)
        engine = engine_of(servers, policy=policy)
        urls = sorted(server.url for server in servers)
        list(engine.complete(requests_of(8)))
        assert sorted(policy.asked) == urls  # once for all that it gets together
        policy.having.remove(urls[0])
        list(engine.complete(requests_of(8)))
        until(lambda: len(engine.fleet.living()) == count)
        assert (policy.given, policy.answered_without, engine.fleet.num_lost) == ([urls[0]], [], 1)

        # In the middle of a batch too: the tree has gone on, and comes back to where it lives.
        for request in requests_of(8):
            policy.having.discard(urls[-1])
            until(lambda: len(engine.fleet.living()) == count)
            engine.submit([request])
            while not engine.collect():
                pass
        assert policy.answered_without == []
        assert policy.given.count(urls[-1]) >= 2
        engine.close()


def test_a_server_with_something_open_is_not_asked() -> None:
    with fake_servers(1, path_determined()) as (server,):
        policy = Policy([server])
        server.script = scripted("late", "answer", "answer")
        engine = engine_of([server], policy=policy)
        engine.submit(requests_of(1))
        until(lambda: server.num_running == 1)
        for request in requests_of(3)[1:]:
            engine.submit([request])
            assert [result.request_id for result in engine.collect()] == [request.request_id]
        assert policy.asked == [server.url]
        assert run_in_loop(ServerConnection(server.url).is_healthy())  # which lets the late answer come
        assert [result.request_id for result in engine.collect()] == [0]
        engine.submit(requests_of(1))
        engine.collect()
        assert policy.asked == [server.url] * 2


@pytest.mark.usefixtures("many_deadlines")
def test_a_server_that_came_back_behind_open_connections_is_found_out_at_a_deadline(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a loss of power: nobody has closed the connections, and another process answers at the address."""
    with fake_servers(1, path_determined()) as (server,):
        policy, is_back = Policy([server]), threading.Event()
        answer = server.script
        server.script = scripted(then="silence")

        async def check(connection: ServerConnection) -> None:
            while policy.asked and not is_back.is_set():  # at the deadline
                await asyncio.sleep(0.01)
            await policy.check_has(connection, None)

        engine = engine_of([server], policy=Given(policy.load, check))
        set_deadline(engine, 0.1)
        engine.submit(requests_of(4))
        until(lambda: server.num_running == 4)
        policy.having.clear()
        server.script = answer
        set_deadline(engine, 240.0)  # of what is sent again
        is_back.set()
        results: list[SegmentResult] = []
        while len(results) < 4:
            results += engine.collect()
        assert (engine.fleet.num_lost, engine.num_resent) == (1, 4)
        assert policy.asked == [server.url] * 3  # for all four together: before they were sent, and sent again
        assert "has forgotten" in caplog.text
        assert policy.answered_without == []
        engine.close()


def test_what_a_check_of_an_idle_server_raises_reaches_the_caller() -> None:
    async def check(connection: ServerConnection) -> None:
        raise OSError("no folder")

    with fake_servers(1) as (server,):
        engine = engine_of([server], policy=Given(nothing, check))
        with pytest.raises(OSError, match="no folder"):
            list(engine.complete(requests_of(2)))
        engine.abort()
        assert server.bodies == []
