"""
Segments from one or several vLLM servers.

The trees are grown here; a server continues token ids, and finds a parent's keys and values in its prefix cache.
Whole trees are placed, so that their prefixes meet again. A lost server costs cached prefixes, and no segment.
"""

import asyncio
import json
import queue
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from treepo_trl.engines.base import SamplingOptions, SegmentEngine, SegmentEngineError, SegmentRequest, SegmentResult
from treepo_trl.engines.vllm_sampling import NUM_TOP_LOGPROBS, entropies_of_answer, sampling_fields

from .connection import GENERATE, ServerConnection, ServerLostError, ServerRefusedError, http_loop
from .facts import ServerFacts
from .pool import ServerPool


_MOST_FAILURES = 5  # of one request, each of which has cost a server
_OTHER_FILES = 1024  # what a process may open by default, and what the training has
_WAKE_SECONDS = 0.02


@dataclass(eq=False)
class _Open:
    """A request that has no result yet."""

    request: SegmentRequest
    body: dict[str, Any]
    num_failures: int = 0


@dataclass(frozen=True, slots=True)
class _Answer:
    """A result, and what it counts."""

    result: SegmentResult
    num_prompt_tokens: int
    num_cached_tokens: int


class VLLMServerEngine(SegmentEngine):
    """
    [`SegmentEngine`] over vLLM servers with `--enable-scale-out`.

    A tree lives on the server with the fewest unfinished trees until it is done. A server that is lost gives its
    trees and open requests to the others, and is asked again until it is back.

    Args:
        servers (`list[ServerConnection]`):
            Servers that answer now; the engine reads their limits.
        eos_token_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`], *optional*):
            How tokens are drawn.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`vllm.SamplingParams`]; they win over `options`.
        with_entropies (`bool`, *optional*, defaults to `False`):
            Whether results carry the entropy of each token's distribution, from vLLM's 20 largest log-probabilities.
        model (`str`, *optional*):
            Name that requests ask for, of the base or an adapter. Default: the base of the first server.
        timeout (`float`, *optional*, defaults to 240):
            Seconds without any server after which `collect` fails, and deadline of a request. A server that is
            healthy then is given four of them.
        on_connect (`Callable[[ServerConnection], None]`, *optional*):
            Called, in a thread, with a server that was lost and answers again, before it gets a request. What it
            raises keeps the server out; it is called again later.
        check_idle (`Callable[[ServerConnection], None]`, *optional*):
            Called, in a thread, with a server that has nothing to do, before it gets a request, and with one that
            is silent. Raises `ServerLostError` if it was started anew, which nothing else shows.

    Attributes:
        model (`str`):
            May be set between batches. A request keeps the name that was set when it was submitted.
        num_resent (`int`):
            Requests that were sent again, because their server was lost.

    Raises:
        ServerLostError, ValueError: for servers that do not answer, or do not fit together.
    """

    def __init__(
        self,
        servers: list[ServerConnection],
        eos_token_ids: list[int],
        options: SamplingOptions | None = None,
        generation_kwargs: Mapping[str, object] | None = None,
        with_entropies: bool = False,
        *,
        model: str | None = None,
        timeout: float = 240.0,
        on_connect: Callable[[ServerConnection], None] | None = None,
        check_idle: Callable[[ServerConnection], None] | None = None,
    ) -> None:
        facts = [server.facts() for server in servers]
        _check_together(servers, facts, with_entropies)
        if model is None:
            _check_names(servers, facts)
        _allow_connections(sum(each.num_slots for each in facts))
        self.eos_token_ids = frozenset(eos_token_ids)
        self.reports_entropies = with_entropies
        self.context_length: int | None = min(each.context_length for each in facts)
        self.block_size: int | None = facts[0].block_size
        self.model = facts[0].model_name if model is None else model
        self.timeout = timeout
        self.on_connect = on_connect
        self.num_resent = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._fields = sampling_fields(
            options or SamplingOptions(), eos_token_ids, generation_kwargs or {}, with_entropies
        )
        _check_json(self._fields)
        self._loop = http_loop()
        pooled = list(zip(servers, facts, strict=True))
        self._pool = ServerPool[_Open](pooled, timeout, self._check_returned, self._send_again, check_idle)
        self._tasks: dict[_Open, asyncio.Task[None]] = {}  # touched in the event loop only
        self._num_in_flight = 0
        self._done: queue.SimpleQueue[_Answer | Exception] = queue.SimpleQueue()

    @property
    def num_lost(self) -> int:
        """How often a server was lost."""
        return self._pool.num_lost

    def living_servers(self) -> list[ServerConnection]:
        """Servers that get requests now."""
        return [server.connection for server in self._pool.living()]

    def wait_for_servers(self) -> list[ServerConnection]:
        """
        As `living_servers`, once there is one.

        Raises:
            RuntimeError: if there is none for `timeout` seconds.
        """
        asyncio.run_coroutine_threadsafe(self._pool.wait(), self._loop).result()
        return self.living_servers()

    def num_slots(self, length: int) -> int | None:
        """Requests that the servers of now run at once, whatever their length."""
        return sum(facts.num_slots for facts in self._facts())

    @property
    def num_cache_tokens(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tokens that the caches of the servers of now keep together."""
        sizes = [facts.num_cache_tokens for facts in self._facts()]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def _facts(self) -> list[ServerFacts]:
        """Of the living servers; where there are none, of those that requests will wait for."""
        return [server.facts for server in self._pool.living() or self._pool.servers]

    # The interface

    def submit(self, requests: list[SegmentRequest]) -> None:
        """Queue requests. Returns at once."""
        opened = [_Open(request, self._body(request)) for request in requests]
        self._num_in_flight += len(opened)
        self._loop.call_soon_threadsafe(lambda: [self._start(each) for each in opened])

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        """
        Block until at least one queued request is done, or `wake` is true; return what is done.

        Raises:
            SegmentEngineError: for a request that a server refuses.
            RuntimeError: if no server was there for `timeout` seconds.
        """
        results: list[SegmentResult] = []
        while self._num_in_flight and not (results and self._done.empty()):
            try:
                outcome = self._done.get(timeout=None if wake is None else _WAKE_SECONDS)
            except queue.Empty:
                if wake is not None and wake():
                    break
                continue
            self._num_in_flight -= 1
            if isinstance(outcome, Exception):
                raise outcome
            self.num_prompt_tokens += outcome.num_prompt_tokens
            self.num_cached_tokens += outcome.num_cached_tokens
            results.append(outcome.result)
        return results

    def abort(self) -> None:
        """Drop everything that is queued or running: a server drops a request whose connection is closed."""
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._done = queue.SimpleQueue()
        self._num_in_flight = 0

    def end_tree(self, tree: int) -> None:
        """The tree no longer counts where it lived."""
        self._loop.call_soon_threadsafe(self._pool.end_tree, tree)

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values. A server that is lost meanwhile has forgotten them anyway."""
        for server in self.living_servers():
            try:
                server.reset_prefix_cache()
            except ServerLostError:
                continue

    def lose(self, connection: ServerConnection, error: Exception) -> None:
        """Give up a server that somebody else has found lost, or wrong; it is asked until it is back, and right."""

        async def lose() -> None:
            for server in self._pool.servers:
                if server.connection is connection:
                    self._send_again(self._pool.lose(server, error))

        asyncio.run_coroutine_threadsafe(lose(), self._loop).result()

    def close(self) -> None:
        """Drop everything, and ask for lost servers no more."""
        self.abort()
        self._loop.call_soon_threadsafe(self._pool.close)

    # Requests, in the event loop

    def _body(self, request: SegmentRequest) -> dict[str, Any]:
        """vLLM does not refuse a `max_tokens` beyond the context, it goes on to its end."""
        assert self.context_length is not None
        max_tokens = min(request.max_tokens, max(self.context_length - len(request.token_ids), 1))
        params = {**self._fields, "max_tokens": max_tokens}
        return {"model": self.model, "token_ids": request.token_ids, "sampling_params": params}

    def _start(self, each: _Open) -> None:
        self._tasks[each] = self._loop.create_task(self._serve(each))

    async def _serve(self, each: _Open) -> None:
        """Send a request to the server of its tree, and put its result or its error among what is done."""
        server = None
        try:
            place = await self._pool.place(each.request.tree)
            server = place.server
            server.open.add(each)
            answer = await server.connection.ask_patiently(
                "POST", GENERATE, each.body, place.headers, self.timeout, partial(self._pool.ask, server)
            )
            outcome = self._read(each.request, answer, server.connection.url)
        except ServerRefusedError as error:
            is_new = error.status == 404 and self.on_connect is not None  # started anew, without its adapter
            outcome = ServerLostError(str(error)) if is_new else self._error(each, str(error))
        except Exception as error:
            outcome = error
        if self._tasks.get(each) is not asyncio.current_task():
            return  # cancelled as its deadline came, which hides that: the request is another task's, or dropped
        if server is not None:
            server.open.discard(each)
        if server is not None and isinstance(outcome, ServerLostError):
            orphans = self._pool.lose(server, outcome)
            each.num_failures += 1
            if each.num_failures < _MOST_FAILURES:
                self._send_again(orphans | {each})
                return
            self._send_again(orphans)
            outcome = self._error(
                each, f"{each.num_failures} times a server was lost with it; the last one: {outcome}"
            )
        del self._tasks[each]
        self._done.put(outcome)

    def _send_again(self, orphans: set[_Open]) -> None:
        """What a lost server had open, in the order in which it was submitted."""
        self.num_resent += len(orphans)
        for each in sorted(orphans, key=lambda each: each.request.request_id):
            if self._tasks[each] is not asyncio.current_task():
                self._tasks[each].cancel()
            self._start(each)

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for server in self._pool.servers:  # now: one that is lost meanwhile must send nothing again
            server.open.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.clear()

    def _error(self, each: _Open, reason: str) -> SegmentEngineError:
        request = each.request
        return SegmentEngineError(
            request.request_id,
            f"vLLM refuses request {request.request_id}, of {len(request.token_ids)} tokens and for the model "
            f"{each.body['model']!r}: {reason}",
        )

    def _read(self, request: SegmentRequest, answer: Any, url: str) -> _Answer:
        try:
            (choice,), usage = answer["choices"], answer["usage"]
            token_ids, reason = choice["token_ids"], choice["finish_reason"]
            content = choice["logprobs"]["content"] if reason in ("stop", "length") else []
            logprobs = [entry["logprob"] for entry in content]
            details = usage.get("prompt_tokens_details") or {}
            counts = usage["prompt_tokens"], details.get("cached_tokens") or 0
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            shown = json.dumps(answer)[:300]
            raise ServerRefusedError(
                f"{url} answers in a form that is not vLLM's ({error!r}): {shown}", 200, shown
            ) from None
        if reason == "abort":  # a server that is being stopped lets go of its requests
            raise ServerLostError(f"{url} has dropped a request.")
        if reason not in ("stop", "length") or not token_ids or len(logprobs) != len(token_ids):
            raise SegmentEngineError(
                request.request_id,
                f"{url} ended request {request.request_id} with reason {reason!r}, {len(token_ids or ())} tokens and "
                f"{len(logprobs)} log-probabilities; expected one for each token, and 'stop' or 'length'.",
            )
        ended: Literal["stop", "length"] = "stop" if token_ids[-1] in self.eos_token_ids else "length"
        entropies = entropies_of_answer(content) if self.reports_entropies else None
        return _Answer(SegmentResult(request.request_id, token_ids, logprobs, ended, entropies), *counts)

    # Servers

    def _check_returned(self, connection: ServerConnection, facts: ServerFacts) -> None:
        """Raise if a server that is back cannot go on with the trees of now."""
        if facts.block_size != self.block_size or facts.context_length < (self.context_length or 0):
            raise ValueError(
                f"it was started with a context of {facts.context_length} and cache blocks of {facts.block_size} "
                f"tokens; this training has {self.context_length} and {self.block_size}. Start it as before."
            )
        if self.on_connect is not None:
            self.on_connect(connection)


def _check_together(servers: list[ServerConnection], facts: list[ServerFacts], with_entropies: bool) -> None:
    """Raise for servers that one engine cannot have together."""
    if not servers:
        raise ValueError("There is no server: give at least one address.")
    sizes = {each.block_size for each in facts}
    if len(sizes) > 1:
        told = ", ".join(f"{server.url} has {each.block_size}" for server, each in zip(servers, facts, strict=True))
        raise ValueError(
            f"The servers' cache blocks differ: {told} tokens. Start all of them with the same `--block-size`."
        )
    for server, each in zip(servers, facts, strict=True):
        if with_entropies and 0 <= each.max_logprobs < NUM_TOP_LOGPROBS:
            raise ValueError(
                f"Entropies need {NUM_TOP_LOGPROBS} log-probabilities per token, and {server.url} gives at most "
                f"{each.max_logprobs}. Start it with `--max-logprobs {NUM_TOP_LOGPROBS}`, or without that flag."
            )
    if not all(server.can_generate() for server in servers):
        missing = ", ".join(server.url for server in servers if not server.can_generate())
        raise ValueError(f"{missing} takes no token ids: start it again with the flag `--enable-scale-out`.")


def _allow_connections(count: int) -> None:
    """Let this process open as many connections, which count as files, or raise if it must not."""
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"The servers run {count} requests at once, each over a connection of its own, and this process may open "
            f"{hard} files. Raise the limit (`ulimit -Hn {needed}`), or lower `--max-num-seqs` of the servers."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _check_names(servers: list[ServerConnection], facts: list[ServerFacts]) -> None:
    """Raise for servers that do not know their model by one name: requests ask for it."""
    if len({each.model_name for each in facts}) > 1:
        told = ", ".join(f"{server.url} as {each.model_name!r}" for server, each in zip(servers, facts, strict=True))
        raise ValueError(
            f"The servers serve their model under different names: {told}. Start them with the same `--model` or "
            "`--served-model-name`."
        )


def _check_json(fields: Mapping[str, object]) -> None:
    try:
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`generation_kwargs` cannot be sent to a server: {error}. Give numbers, texts, lists and dictionaries."
        ) from None
