"""
The vLLM servers of a process, and the one place that knows the state of each.

An engine asks for the place of a tree, and sends requests there. Whoever has written a new version of the policy lets
the fleet distribute it. A server that is lost is asked until it is back; then it is checked, given the current version
and compared with the others before it gets a request.

The state changes in the loop of the requests alone. Other threads call the methods that block.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch

from .checks import ServerNeeds, check_number_types, check_together, checked_facts, facts_at_start, shared_model_name
from .connection import ServerConnection, ServerLostError, ServerRefusedError, http_loop, run_in_loop
from .facts import ServerFacts
from .reference import Reference, bound_of_probe, probe_logprobs
from .server import Place, Server, Tree
from .versions import ServedPolicy


logger = logging.getLogger(__name__)  # also where nothing is accelerated

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 5.0  # seconds between two questions whether a server is back
_HEALTH_SECONDS = 5.0

Result = TypeVar("Result")


class Fleet:
    """
    Servers that sample together. The start waits for them, and checks each.

    Args:
        urls (`list[str]`):
            Their addresses.
        needs ([`ServerNeeds`], *optional*):
            What each of them must be.
        policy ([`ServedPolicy`], *optional*):
            What they are given before they sample. Default: they sample from what they have.
        timeout (`float`, *optional*, defaults to 240):
            Seconds that the start waits for the servers, after which a request counts as lost, and without any server
            after which `place` fails. A server that is healthy then is given four of them.
        model (`str`, *optional*):
            Name that requests ask for, of the base or an adapter. Default: the servers' own model.
        reference ([`Reference`], *optional*):
            What servers must compute alike. Without one they are not asked.

    Attributes:
        model (`str`):
            Distributing a version sets it to that. A request keeps the name with which it was submitted.
        block_size (`int`, *optional*), context_length (`int`):
            Of all servers, at all times.
        num_lost (`int`):
            How often a server was lost.

    Raises:
        ValueError: for a server that is not up in time, or not what it must be.
    """

    def __init__(
        self,
        urls: list[str],
        needs: ServerNeeds | None = None,
        policy: ServedPolicy | None = None,
        timeout: float = 240.0,
        *,
        model: str | None = None,
        reference: Reference | None = None,
    ) -> None:
        if not urls:
            raise ValueError("There is no server: give at least one address.")
        self.needs, self.policy, self.timeout, self.reference = needs or ServerNeeds(), policy, timeout, reference
        connections = [ServerConnection(url, timeout) for url in urls]
        found = run_in_loop(facts_at_start(connections, self.needs, timeout))
        by_url = {server.url: facts for server, facts in found.items()}
        check_together(by_url)
        first = next(iter(found.values()))
        if reference is not None:
            check_number_types(by_url)
            reference.bound = bound_of_probe(getattr(torch, first.dtype))
            reference.is_quantized = first.quantization is not None
        self.servers = [Server(connection, facts, policy) for connection, facts in found.items()]
        self.model = shared_model_name(by_url) if model is None else model
        self.block_size = first.block_size
        self.context_length = min(facts.context_length for facts in found.values())
        self.num_lost = 0
        self._homes: dict[Tree, Place] = {}
        self._none_since = 0.0
        self._some_are_up = asyncio.Event()
        self._returns: set[asyncio.Task[None]] = set()
        self._giving = asyncio.Lock()  # so that no server is let in while a version is given to the others

    def living(self) -> list[Server]:
        """Servers that get requests."""
        return [server for server in self.servers if server.is_up]

    # Methods that block

    def distribute(self) -> list[int] | None:
        """
        Give the version that was just written to all servers that are up.

        The others get it once they have passed all checks.

        Returns:
            `list[int]`, *optional*: tokens of a probe for the policy (`take_reference`), if no server has answered it.

        Raises:
            ValueError: if a server cannot load the first version, or none of those that have the one before a later
                one; or if a server computes something else with it than the first.
        """
        run_in_loop(self._distribute())
        return self.reference.token_ids if self.reference is not None and self.reference.is_missing else None

    def take_reference(self, logprobs: torch.Tensor) -> None:
        """Compare the servers that come back with the policy; no server is admitted before."""

        async def take() -> None:
            async with self._giving:
                assert self.reference is not None
                self.reference.set(self._version, logprobs)

        run_in_loop(take())

    def reset_prefix_caches(self) -> None:
        """Forget all keys and values. A server that is lost has forgotten them anyway."""
        run_in_loop(self._of_each(lambda server: server.connection.reset_prefix_cache(), self.living()))

    def close(self) -> None:
        """Ask for lost servers no more."""
        http_loop().call_soon_threadsafe(lambda: [task.cancel() for task in self._returns])

    # Trees and requests

    async def place(self, tree: Tree) -> Place:
        """
        Where a tree lives; a new one, and one whose server is lost, goes where the fewest are unfinished.

        A server that has nothing open is asked whether it was started anew, which nothing else shows.

        Raises:
            RuntimeError: if there is no server for too long.
        """
        while True:
            await self._wait()
            home = self._homes.get(tree)
            if home is None:
                places = [place for server in self.living() for place in server.places]
                home = min(places, key=lambda place: (len(place.trees), place.server.num_trees))
                home.trees.add(tree)
                self._homes[tree] = home
            if home.server.num_open:  # a restart would have closed what is open
                return home
            try:
                await home.server.check_policy()
            except ServerLostError as error:
                self.lose(home, error)
            if self._homes.get(tree) is home:
                return home

    def end_tree(self, tree: Tree) -> None:
        """The tree is done."""
        home = self._homes.pop(tree, None)
        if home is not None:
            home.trees.discard(tree)

    def end_trees(self, engine: object) -> None:
        """All trees of an engine are done."""
        for tree in [tree for tree in self._homes if tree[0] is engine]:
            self.end_tree(tree)

    # Servers that go and come

    def lose(self, place: Place, error: Exception) -> bool:
        """
        Give up the server of a place until it is back. Its trees have no home any more.

        Returns:
            `bool`: whether nobody has found that before.
        """
        return place in place.server.places and self._lose(place.server, error)

    def _lose(self, server: Server, error: Exception) -> bool:
        if not server.is_up:
            return False
        server.shut_out(error)
        self.num_lost += 1
        logger.warning(
            f"A vLLM server is lost: {error} Its unfinished trees ({server.num_trees}) and open requests "
            f"({server.num_open}) go to the servers that are left ({len(self.living())})."
        )
        for tree in [tree for place in server.places for tree in place.trees]:
            self.end_tree(tree)
        if not self.living():
            self._none_since = asyncio.get_running_loop().time()
            self._some_are_up.clear()
        task = asyncio.get_running_loop().create_task(self._bring_back(server))
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)
        return True

    async def _wait(self) -> None:
        """Wait until there is a server, but not for too long."""
        try:
            while not self.living():
                left = self._none_since + self.timeout - asyncio.get_running_loop().time()
                await asyncio.wait_for(self._some_are_up.wait(), left)
        except TimeoutError:
            reasons = "".join(f"\n- {server.url}: {server.error}" for server in self.servers)
            raise RuntimeError(
                f"No vLLM server has answered for {self.timeout:g} s. Start them again with the same flags and go on "
                f"from the last checkpoint; a longer `vllm_server_timeout` waits longer.{reasons}"
            ) from None

    async def _bring_back(self, server: Server) -> None:
        """Ask a lost server now and then; it gets requests again once it is admitted."""
        wait, told = _FIRST_WAIT, ""
        while not server.is_up:
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
            try:
                await server.connection.get("/health", _HEALTH_SECONDS)
                await self.admit(server)
            except ServerLostError:
                continue  # why it was lost says more than that it still is
            except Exception as error:
                server.error = str(error)
                if server.error != told:
                    logger.warning(f"The server {server.url} is back and gets no requests: {error}")
                    told = server.error
        logger.warning(f"The server {server.url} is back and gets new trees.")

    async def admit(self, server: Server) -> None:
        """
        Check a server that was lost and answers again, give it the current version, and let it generate a token.

        Raises:
            ValueError: if it is not what it was.
            ServerLostError: if it is lost again, or if nobody has computed anything with the current version yet.
        """
        connection = server.connection
        facts = await connection.facts()
        if facts.block_size != self.block_size or facts.context_length < self.context_length:
            raise ValueError(
                f"it was started with a context of {facts.context_length} and cache blocks of {facts.block_size} "
                f"tokens; this training has {self.context_length} and {self.block_size}. Start it as before."
            )
        await checked_facts(connection, self.needs)
        if self.reference is not None and facts.number_type != server.facts.number_type:
            raise ValueError(
                f"The vLLM server at {server.url} computes in {facts.number_type}, and in {server.facts.number_type} "
                "before it was started anew. Start it with the same `--dtype` and `--quantization`."
            )
        while not await self._is_admitted(server, facts):
            pass

    async def _is_admitted(self, server: Server, facts: ServerFacts) -> bool:
        """
        Give a server the current version; what is running on others goes on, and they may get a new one meanwhile.

        Returns:
            `bool`: whether it still is the current one. Else it is to be given again.
        """
        version, reference, logprobs = self._version, self.reference, None
        try:
            if self.policy is not None:
                await self.policy.load(server.connection)
            if reference is not None:  # compared or not: an engine that hangs is not there
                logprobs = await self._probe(reference, server.connection, facts)
        except (ValueError, ServerRefusedError):
            if version == self._version:
                raise
            return False  # its folder is gone
        async with self._giving:  # not before: a server that hangs would keep the others from a new version
            if version != self._version:
                return False
            if reference is not None and logprobs is not None:
                reference.compare(server.url, version, logprobs)
            server.let_in(facts, version)
            self._some_are_up.set()
            return True

    # The policy

    @property
    def _version(self) -> str | None:
        """The current one."""
        return None if self.policy is None else self.policy.name

    async def _distribute(self) -> None:
        policy = self.policy
        assert policy is not None, "there is something to give"
        async with self._giving:
            found = await self._of_each(self._give, self.living())
            refused = {server: error for server, error in found.items() if error is not None}
            if refused and len(refused) == len(found):  # the others are lost
                raise next(iter(refused.values()))
            for server, error in refused.items():
                self._lose(server, error)
            loaded = [server for server in found if server not in refused]
            for server in loaded:
                server.version = policy.name
            await policy.remove_old(server.connection for server in loaded)
            await self._compare(loaded)
            self.model = policy.model or self.model

    async def _give(self, server: Server) -> Exception | None:
        """Load the current version; what a server has against one that is not its first."""
        policy, connection = self.policy, server.connection
        assert policy is not None
        if server.version is None:
            await checked_facts(connection, self.needs)
            await policy.load(connection)
            return None
        await policy.check_has(connection, server.version)
        try:
            await policy.load(connection)
        except (ValueError, ServerRefusedError) as error:
            return error
        return None

    async def _compare(self, loaded: list[Server]) -> None:
        """Raise unless servers with the current version compute the same."""
        if self.reference is None or not self.reference.is_compared:
            return
        computed = await self._of_each(self._probe_loaded, loaded)
        self.reference.set(self._version, next(iter(computed.values()), None))
        for server, logprobs in computed.items():
            self.reference.compare(server.url, self._version, logprobs)

    async def _probe_loaded(self, server: Server) -> torch.Tensor:
        assert self.reference is not None
        try:
            return await self._probe(self.reference, server.connection, server.facts)
        except ServerRefusedError as error:
            if error.status != 404:
                raise
            raise ServerLostError(str(error), 404) from error  # it was started anew since it has loaded the version

    async def _probe(self, reference: Reference, connection: ServerConnection, facts: ServerFacts) -> torch.Tensor:
        model = None if self.policy is None else self.policy.model
        return await probe_logprobs(connection, model or facts.model_name, reference.token_ids)

    async def _of_each(
        self, work: Callable[[Server], Awaitable[Result]], servers: list[Server]
    ) -> dict[Server, Result]:
        """Results for several servers at once, without those that are lost meanwhile."""

        async def result(server: Server) -> tuple[Server, Result] | None:
            try:
                return server, await work(server)
            except ServerLostError as error:
                self._lose(server, error)
                return None

        results = await asyncio.gather(*map(result, servers), return_exceptions=True)
        for each in results:
            if isinstance(each, BaseException):
                raise each
        return dict(each for each in results if isinstance(each, tuple))
