"""Which server a tree lives on, which servers are lost, and how they come back."""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .connection import ServerConnection, ServerLostError
from .facts import ServerFacts


logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 5.0  # seconds between two questions whether a server is back
_HEALTH_SECONDS = 5.0

T = TypeVar("T")
Result = TypeVar("Result")


@dataclass(eq=False)
class PooledServer(Generic[T]):
    """A server, its trees and its open requests."""

    connection: ServerConnection
    facts: ServerFacts
    is_alive: bool = True
    error: str = ""
    """Why it was lost, or is kept out."""
    places: list["Place[T]"] = field(default_factory=list["Place[T]"])
    open: set[T] = field(default_factory=set[T])
    """Requests that it was sent and has not answered."""
    question: asyncio.Task[None] | None = None
    """Whether it was started anew, while it is asked."""

    @property
    def num_trees(self) -> int:
        return sum(len(place.trees) for place in self.places)


@dataclass(eq=False)
class Place(Generic[T]):
    """One prefix cache: a server, or a data-parallel rank of one."""

    server: PooledServer[T]
    headers: dict[str, str]
    """What sends a request to this rank."""
    trees: set[int] = field(default_factory=set[int])
    """Unfinished trees."""


def _places_of(server: PooledServer[T]) -> list[Place[T]]:
    num_ranks = server.facts.data_parallel_size
    ranks = [{"X-data-parallel-rank": str(rank)} for rank in range(num_ranks)] if num_ranks > 1 else [{}]
    return [Place(server, headers) for headers in ranks]


class ServerPool(Generic[T]):
    """
    Servers of one engine. All methods but those of the first section run in the event loop.

    Args:
        servers (`list[tuple[ServerConnection, ServerFacts]]`):
            Servers that answer now, and how they were started.
        timeout (`float`):
            Seconds without any server after which `place` fails.
        check (`Callable[[ServerConnection, ServerFacts], None]`):
            Called, in a thread, with a server that is back; it stays out while this raises.
        send_again (`Callable[[set], None]`):
            Called with what a server had open that `check_idle` has found lost.
        check_idle (`Callable[[ServerConnection], None]`, *optional*):
            Called, in a thread, with a server that has nothing open, before it gets a request, and with one that is
            silent. It is lost if this raises `ServerLostError`.

    Attributes:
        num_lost (`int`):
            How often a server was lost.
    """

    def __init__(
        self,
        servers: list[tuple[ServerConnection, ServerFacts]],
        timeout: float,
        check: Callable[[ServerConnection, ServerFacts], None],
        send_again: Callable[[set[T]], None],
        check_idle: Callable[[ServerConnection], None] | None = None,
    ) -> None:
        self.servers = [PooledServer[T](connection, facts) for connection, facts in servers]
        for server in self.servers:
            server.places = _places_of(server)
        self.num_lost = 0
        self._timeout, self._check = timeout, check
        self._check_idle, self._send_again = check_idle, send_again
        self._homes: dict[int, Place[T]] = {}
        self._none_since = 0.0
        self._returned = asyncio.Event()
        self._reconnects: set[asyncio.Task[None]] = set()

    def living(self) -> list[PooledServer[T]]:
        """Servers that get requests."""
        return [server for server in self.servers if server.is_alive]

    # Trees

    async def place(self, tree: int) -> Place[T]:
        """
        Where a tree lives; a new one, and one whose server is lost, goes where the fewest are unfinished.

        Raises:
            RuntimeError: if there is no server for too long.
        """
        while True:
            await self.wait()
            home = self._homes.get(tree)
            if home is None:
                places = [place for server in self.living() for place in server.places]
                home = min(places, key=lambda place: (len(place.trees), place.server.num_trees))
                home.trees.add(tree)
                self._homes[tree] = home
            if self._check_idle is None or home.server.open:  # a restart would have closed what is open
                return home
            await self.ask(home.server)
            if self._homes.get(tree) is home:
                return home

    async def ask(self, server: PooledServer[T]) -> None:
        """Lose a server that was started anew; all that wait for its answer ask once."""
        check = self._check_idle
        if check is None:
            return

        async def ask() -> None:
            try:
                await _in_thread(lambda: check(server.connection))
            except ServerLostError as error:
                self._send_again(self.lose(server, error))
            finally:
                server.question = None

        if server.question is None:
            server.question = asyncio.get_running_loop().create_task(ask())
        await asyncio.shield(server.question)  # a request that is cancelled leaves it to the others

    def end_tree(self, tree: int) -> None:
        """The tree is done."""
        home = self._homes.pop(tree, None)
        if home is not None:
            home.trees.discard(tree)

    def clear(self) -> None:
        """All trees are done."""
        for tree in list(self._homes):
            self.end_tree(tree)

    # Lost servers

    def lose(self, server: PooledServer[T], error: Exception) -> set[T]:
        """Give up a server until it is back; returns what it had open. Its trees have no home any more."""
        if not server.is_alive:
            return set()
        server.is_alive, server.error = False, str(error)
        self.num_lost += 1
        logger.warning(
            f"A vLLM server is lost: {error} Its unfinished trees ({server.num_trees}) and open requests "
            f"({len(server.open)}) go to the servers that are left ({len(self.living())})."
        )
        for place in server.places:
            for tree in list(place.trees):
                self.end_tree(tree)
        if not self.living():
            self._none_since = asyncio.get_running_loop().time()
            self._returned.clear()
        task = asyncio.get_running_loop().create_task(self._reconnect(server))
        self._reconnects.add(task)
        task.add_done_callback(self._reconnects.discard)
        orphans = set(server.open)
        server.open.clear()
        return orphans

    async def wait(self) -> None:
        """
        Wait until there is a server.

        Raises:
            RuntimeError: if there is none for too long.
        """
        try:
            while not self.living():
                left = self._none_since + self._timeout - asyncio.get_running_loop().time()
                await asyncio.wait_for(self._returned.wait(), left)
        except TimeoutError:
            reasons = "".join(f"\n- {server.connection.url}: {server.error}" for server in self.servers)
            raise RuntimeError(
                f"No vLLM server has answered for {self._timeout:g} s. Start them again with the same flags and go on "
                f"from the last checkpoint; a longer `vllm_server_timeout` waits longer.{reasons}"
            ) from None

    async def _reconnect(self, server: PooledServer[T]) -> None:
        """Ask a lost server now and then; it gets requests again once it has passed all checks."""
        connection, wait, told = server.connection, _FIRST_WAIT, ""
        while True:
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
            try:
                await connection.ask("GET", "/health", timeout=_HEALTH_SECONDS)
                facts = await _in_thread(lambda: self._look_at(connection))
            except ServerLostError:
                continue  # why it was lost says more than that it still is
            except Exception as error:
                server.error = str(error)
                if server.error != told:
                    logger.warning(f"The server {connection.url} is back and gets no requests: {error}")
                    told = server.error
                continue
            server.facts, server.is_alive, server.error = facts, True, ""
            server.places = _places_of(server)
            logger.warning(f"The server {connection.url} is back and gets new trees.")
            self._returned.set()
            return

    def _look_at(self, connection: ServerConnection) -> ServerFacts:
        """Facts of a server that is back, after all checks."""
        facts = connection.facts()
        self._check(connection, facts)
        return facts

    def close(self) -> None:
        """Ask for lost servers no more."""
        for task in self._reconnects:
            task.cancel()


async def _in_thread(work: Callable[[], Result]) -> Result:
    """What a function returns, from a thread that may die with the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(set_outcome: Callable[..., None], outcome: object) -> None:
        if not done.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, done.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, done.set_result, result)

    threading.Thread(target=run, daemon=True).start()
    return await done
