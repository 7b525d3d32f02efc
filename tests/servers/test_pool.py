"""Where trees go, and how often lost servers are asked, without a server."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from treepo_trl.servers import pool as server_pool
from treepo_trl.servers.connection import ServerLostError
from treepo_trl.servers.pool import ServerPool


class Connection:
    """It answers once it was asked `num_failures` times."""

    def __init__(self, num_ranks: int = 1, num_failures: float = 0) -> None:
        self.url, self.num_ranks, self.num_failures, self.num_asked = "http://one", num_ranks, num_failures, 0

    async def ask(self, *_: Any, **__: Any) -> None:
        self.num_asked += 1
        if self.num_asked <= self.num_failures:
            raise ServerLostError("gone")

    def facts(self) -> Any:
        return SimpleNamespace(data_parallel_size=self.num_ranks)


def pool_of(*connections: Connection, timeout: float = 60.0) -> ServerPool[int]:
    servers: Any = [(connection, connection.facts()) for connection in connections]
    return ServerPool[int](servers, timeout, check=lambda *_: None, send_again=lambda _: None)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))  # pyright: ignore[reportArgumentType]


def test_a_tree_goes_to_the_server_with_the_fewest_where_ranks_tie() -> None:
    """Two ranks of the first server and one of the second: the second tree shares its server with none."""

    async def work() -> None:
        pool = pool_of(Connection(num_ranks=2), Connection())
        places = [await pool.place(tree) for tree in range(3)]
        assert [pool.servers.index(place.server) for place in places] == [0, 1, 0]
        assert places[0] is not places[2]

    run(work)


def test_a_lost_server_is_asked_more_and_more_seldom_but_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(server_pool, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))

    async def work() -> None:
        pool = pool_of(Connection(num_failures=7))
        pool.lose(pool.servers[0], ServerLostError("gone"))
        await pool.wait()

    run(work)
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_who_waits_for_a_server_that_is_lost_once_more_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not ask in a circle whether there is one."""

    async def work() -> None:
        pool = pool_of(Connection(), timeout=0.3)
        pool.lose(pool.servers[0], ServerLostError("gone"))
        await pool.wait()
        questions, living = [0], pool.living

        def counted() -> Any:
            questions[0] += 1
            return living()

        monkeypatch.setattr(pool, "living", counted)
        pool.servers[0].connection.num_failures = float("inf")  # pyright: ignore[reportAttributeAccessIssue]
        pool.lose(pool.servers[0], ServerLostError("gone"))
        with pytest.raises(RuntimeError, match=r"No vLLM server has answered for 0\.3 s"):
            await pool.wait()
        assert questions[0] < 10

    run(work)
