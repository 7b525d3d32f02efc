"""A server of a fleet: its state, which the fleet alone changes, and requests that wait for it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .connection import GENERATE, QUESTION_SECONDS, ServerConnection, ServerLostError, ServerRefusedError, http_loop
from .facts import ServerFacts
from .versions import ServedPolicy


logger = logging.getLogger(__name__)

MOST_DEADLINES = 4  # that a request waits for a server that is healthy: one that hangs may answer `/health` too

Tree = tuple[object, int]
"""The engine that grows it, and its number there."""


@dataclass(eq=False)
class Place:
    """One prefix cache: a server, or a data-parallel rank of one."""

    server: "Server"
    headers: dict[str, str]
    """What sends a request to this rank."""
    trees: set[Tree] = field(default_factory=set)
    """Unfinished trees."""


class Server:
    """
    A server that gets requests until it is lost, and again once it was let in.

    Args:
        connection ([`ServerConnection`]):
            Where it is.
        facts ([`ServerFacts`]):
            How it was started.
        policy ([`ServedPolicy`], *optional*):
            What it is given.

    Attributes:
        is_up (`bool`):
            Whether it gets requests.
        lost (`asyncio.Future`):
            Done once it is lost; a server that comes back has another.
        error (`str`):
            Why it was lost, or is kept out.
        version (`str`, *optional*):
            Of the policy, which it was given last.
        places (`list[Place]`):
            Where trees live on it; one that comes back has others.
        num_open (`int`):
            Requests that it was sent and has not answered.
    """

    def __init__(self, connection: ServerConnection, facts: ServerFacts, policy: ServedPolicy | None = None) -> None:
        self.connection, self.url, self.policy = connection, connection.url, policy
        self.is_up, self.num_open = False, 0
        self._questions: dict[str, asyncio.Future[None]] = {}
        self._is_told_slow = False
        self.let_in(facts, None)

    def let_in(self, facts: ServerFacts, version: str | None) -> None:
        """It gets requests from now on."""
        self.facts, self.version, self.error = facts, version, ""
        if not self.is_up:
            self.is_up, self.lost = True, http_loop().create_future()
            count = facts.data_parallel_size
            ranks = [{"X-data-parallel-rank": str(rank)} for rank in range(count)] if count > 1 else [{}]
            self.places = [Place(self, headers) for headers in ranks]

    def shut_out(self, error: Exception) -> None:
        """It gets no request any more, and those that wait for it hear that."""
        self.is_up, self.error = False, str(error)
        self.lost.set_result(None)

    @property
    def num_trees(self) -> int:
        """Unfinished trees that live on it."""
        return sum(len(place.trees) for place in self.places)

    async def ask(self, place: Place, body: Mapping[str, object]) -> Any:
        """
        What the server generates in one of its places.

        A server that is silent at the deadline is waited for if it is healthy, `MOST_DEADLINES` times as long.

        Raises:
            ServerLostError: for a server that must be given up, or that was meanwhile.
            ServerRefusedError: if it refuses the request.
        """
        lost, seconds = self.lost, self.connection.timeout
        request = self.connection.ask("POST", GENERATE, body, place.headers, MOST_DEADLINES * seconds)
        asking = asyncio.ensure_future(request)
        self.num_open += 1
        try:
            await asyncio.wait({asking, lost}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            while not asking.done():
                if lost.done():
                    raise ServerLostError(self.error)
                await self._examine(asking)
                await asyncio.wait({asking, lost}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return asking.result()
        except ServerRefusedError as error:
            if error.status == 404 and self.policy is not None:  # started anew, without its adapter
                raise ServerLostError(str(error), 404) from error
            raise
        finally:
            self.num_open -= 1
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _examine(self, asking: "asyncio.Future[Any]") -> None:
        """Raise for a silent server that is not healthy, or that came back behind open connections."""
        seconds = self.connection.timeout
        try:
            await self._ask_once("health", lambda: self.connection.get("/health", QUESTION_SECONDS))
        except (ServerLostError, ServerRefusedError) as error:
            if asking.done():  # meanwhile
                return
            raise ServerLostError(
                f"{self.url} has not answered POST {GENERATE} for {seconds:g} s. Nor is it healthy: {error}"
            ) from None
        await self.check_policy()
        if not self._is_told_slow:
            logger.warning(
                f"The vLLM server at {self.url} has not answered a request for {seconds:g} s "
                f"(`vllm_server_timeout`). It is healthy, so it is waited for, {MOST_DEADLINES} times as long in all. "
                "Raise the setting if requests take that long; if not, look at the server's log. This is said once."
            )
            self._is_told_slow = True

    async def check_policy(self) -> None:
        """
        Raise if the server was started anew: it has lost the version that it was given.

        Raises:
            ServerLostError: if so, or if it cannot be reached.
        """
        policy = self.policy
        if policy is not None:
            await self._ask_once("policy", lambda: policy.check_has(self.connection, self.version))

    async def _ask_once(self, what: str, question: Callable[[], Awaitable[None]]) -> None:
        """Ask something; all that wait for the answer ask once, as each connection is an open file."""
        asking = self._questions.get(what)
        if asking is None or asking.done():
            asking = self._questions[what] = asyncio.ensure_future(question())
        await asyncio.shield(asking)  # a request that is cancelled leaves it to the others
