"""Where trees go, how often lost servers are asked, and how often silent ones."""

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.fake_vllm import FakeVLLM, fake_servers
from treepo_trl.servers import fleet as fleet_module
from treepo_trl.servers.connection import GENERATE, ServerConnection, ServerLostError, run_in_loop
from treepo_trl.servers.fleet import Fleet


class Absent(FakeVLLM):
    """It is healthy once it was asked `num_failures` times."""

    num_failures: float = 0

    @property
    def health(self) -> int:
        return 200 if self.num_health > self.num_failures else 503

    @health.setter
    def health(self, value: int) -> None:
        pass


def run(work: Coroutine[Any, Any, None]) -> None:
    run_in_loop(asyncio.wait_for(work, 60))


def gone(fleet: Fleet) -> None:
    fleet.lose(fleet.servers[0].places[0], ServerLostError("gone"))


def test_a_tree_goes_to_the_server_with_the_fewest_where_ranks_tie() -> None:
    """Two ranks of the first server and one of the second: the second tree shares its server with none."""
    ranks = {"parallel_config": {"data_parallel_size": 2}}
    with fake_servers(1, changes=ranks) as (first,), fake_servers(1) as (second,):
        fleet = Fleet([first.url, second.url])

        async def work() -> None:
            places = [await fleet.place((None, tree)) for tree in range(3)]
            assert [fleet.servers.index(place.server) for place in places] == [0, 1, 0]
            assert places[0] is not places[2]

        run(work())


def test_a_lost_server_is_asked_more_and_more_seldom_but_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with Absent() as server:
        fleet = Fleet([server.url])
        monkeypatch.setattr(fleet_module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
        server.num_failures = server.num_health + 7

        async def work() -> None:
            gone(fleet)
            await fleet.place((None, 0))

        run(work())
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_who_waits_for_a_server_that_is_lost_once_more_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not ask in a circle whether there is one."""
    with Absent() as server:
        fleet = Fleet([server.url])
        questions, living = [0], fleet.living

        def counted() -> Any:
            questions[0] += 1
            return living()

        async def work() -> None:
            gone(fleet)
            await fleet.place((None, 0))
            fleet.timeout, server.num_failures = 0.3, float("inf")
            monkeypatch.setattr(fleet, "living", counted)
            gone(fleet)
            with pytest.raises(RuntimeError, match=r"No vLLM server has answered for 0\.3 s"):
                await fleet.place((None, 0))

        run(work())
        assert questions[0] < 10
        fleet.close()


@pytest.mark.parametrize("is_healthy_then", [True, False])
def test_requests_that_wait_together_ask_once_and_take_an_answer_that_comes_meanwhile(
    is_healthy_then: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health is told later, when the requests are answered."""
    with fake_servers(1) as (server,):
        fleet = Fleet([server.url])
        asked, answered, num_questions = asyncio.Event(), asyncio.Event(), [0]

        async def ask(self: ServerConnection, method: str, path: str, *args: object, **options: object) -> object:
            if path == GENERATE:
                await asked.wait()
                answered.set()
                return "here it is"
            num_questions[0] += 1
            for _ in range(1000):  # until all have come to ask
                await asyncio.sleep(0)
            asked.set()
            await answered.wait()
            if not is_healthy_then:
                raise ServerLostError("It is not healthy.")
            return None

        async def ask_all() -> None:
            place = await fleet.place((None, 0))
            assert await asyncio.gather(*(place.server.ask(place, {}) for _ in range(50))) == ["here it is"] * 50

        monkeypatch.setattr(ServerConnection, "ask", ask)
        fleet.servers[0].connection.timeout = 0.0
        run(ask_all())
        assert num_questions == [1]
