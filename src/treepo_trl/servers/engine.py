"""
Segments from one or several vLLM servers.

The trees are grown here; a server continues token ids, and finds a parent's keys and values in its prefix cache.
Whole trees are placed, so that their prefixes meet again. A lost server costs cached prefixes, and no segment.
"""

import asyncio
import json
import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from treepo_trl.engines.base import SamplingOptions, SegmentEngine, SegmentEngineError, SegmentRequest, SegmentResult
from treepo_trl.engines.vllm_sampling import entropies_of_answer, sampling_fields

from .connection import ServerLostError, ServerRefusedError, http_loop, run_in_loop
from .facts import ServerFacts
from .fleet import Fleet


_MOST_FAILURES = 5  # of one request, each of which has cost a server
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
    trees and open requests to the others.

    Args:
        fleet ([`Fleet`]):
            The servers. Engines may share them.
        eos_token_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`], *optional*):
            How tokens are drawn.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`vllm.SamplingParams`]; they win over `options`.
        with_entropies (`bool`, *optional*, defaults to `False`):
            Whether results carry the entropy of each token's distribution, from vLLM's 20 largest log-probabilities;
            `ServerNeeds` say whether servers give as many.

    Attributes:
        num_resent (`int`):
            Requests that were sent again, because their server was lost.

    Raises:
        ValueError: for options that cannot be sent.
    """

    def __init__(
        self,
        fleet: Fleet,
        eos_token_ids: list[int],
        options: SamplingOptions | None = None,
        generation_kwargs: Mapping[str, object] | None = None,
        with_entropies: bool = False,
    ) -> None:
        self.fleet = fleet
        self.eos_token_ids = frozenset(eos_token_ids)
        self.reports_entropies = with_entropies
        self.context_length: int | None = fleet.context_length
        self.block_size: int | None = fleet.block_size
        self.num_resent = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._fields = sampling_fields(
            options or SamplingOptions(), eos_token_ids, generation_kwargs or {}, with_entropies
        )
        _check_json(self._fields)
        self._tasks: dict[_Open, asyncio.Task[None]] = {}  # touched in the event loop only
        self._num_in_flight = 0
        self._done: queue.SimpleQueue[_Answer | Exception] = queue.SimpleQueue()

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
        return [server.facts for server in self.fleet.living() or self.fleet.servers]

    # The interface

    def submit(self, requests: list[SegmentRequest]) -> None:
        """Queue requests. Returns at once."""
        opened = [_Open(request, self._body(request)) for request in requests]
        self._num_in_flight += len(opened)
        http_loop().call_soon_threadsafe(self._start, opened)

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
        run_in_loop(self._cancel_all())
        self._done = queue.SimpleQueue()
        self._num_in_flight = 0

    def end_tree(self, tree: int) -> None:
        """The tree no longer counts where it lived."""
        http_loop().call_soon_threadsafe(self.fleet.end_tree, (self, tree))

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values."""
        self.fleet.reset_prefix_caches()

    def close(self) -> None:
        """Drop everything, and ask for lost servers no more."""
        self.abort()
        self.fleet.close()

    # Requests, in the event loop

    def _body(self, request: SegmentRequest) -> dict[str, Any]:
        """vLLM does not refuse a `max_tokens` beyond the context, it goes on to its end."""
        max_tokens = min(request.max_tokens, max(self.fleet.context_length - len(request.token_ids), 1))
        params = {**self._fields, "max_tokens": max_tokens}
        return {"model": self.fleet.model, "token_ids": request.token_ids, "sampling_params": params}

    def _start(self, opened: list[_Open]) -> None:
        for each in opened:
            self._tasks[each] = http_loop().create_task(self._serve(each))

    async def _serve(self, each: _Open) -> None:
        """Send a request to the server of its tree until one answers; put the result or error among what is done."""
        outcome: _Answer | Exception | None = None
        while outcome is None and each in self._tasks:
            try:
                outcome = await self._try(each)
            except Exception as error:
                outcome = error
        if each in self._tasks:  # else it was dropped, and something has hidden that
            del self._tasks[each]
            self._done.put(outcome)  # pyright: ignore[reportArgumentType] - there is one

    async def _try(self, each: _Open) -> _Answer | None:
        """The answer of the server where the tree lives now; `None` if that is lost."""
        place = await self.fleet.place((self, each.request.tree))
        try:
            return self._read(each.request, await place.server.ask(place, each.body), place.server.url)
        except ServerRefusedError as error:
            raise self._error(each, str(error)) from None
        except ServerLostError as error:
            if self.fleet.lose(place, error):  # with this request, and not with another one
                each.num_failures += 1
                if each.num_failures == _MOST_FAILURES:
                    reason = f"{each.num_failures} times a server was lost with it; the last one: {error}"
                    raise self._error(each, reason) from None
            self.num_resent += 1
            return None

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.fleet.end_trees(self)

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


def _check_json(fields: Mapping[str, object]) -> None:
    try:
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`generation_kwargs` cannot be sent to a server: {error}. Give numbers, texts, lists and dictionaries."
        ) from None
