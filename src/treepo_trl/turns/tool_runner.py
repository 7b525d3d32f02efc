"""Tool calls of a turn, run as TRL runs them: what a tool raises is its answer. Standard library only."""

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from treepo_trl.sampling.nodes import Message

from .workers import Workers, WorkTimeoutError, within


logger = logging.getLogger(__name__)

T = TypeVar("T")
Tool = Callable[..., object]

_GRACE = 5.0  # seconds that running calls get when a batch is given up
_THREAD_WORDS = ("main thread", "same thread", "different thread", "no current event loop in thread")


class ToolThreadError(RuntimeError):
    """A tool that works in the main thread alone was called in another one."""


class EnvironmentLostError(RuntimeError):
    """A call on an environment took too long; nobody knows which state the environment is in."""


@dataclass
class CallResults:
    """What the calls of a turn have given, in the order of the calls."""

    results: list[tuple[str, object]] = field(default_factory=list[tuple[str, object]])
    """Name of the tool, and what it returned or `{"error": ...}`."""
    num_failures: int = 0
    """How many calls failed."""


class ToolRunner:
    """
    Runs calls in threads, beside the sampler.

    Args:
        workers (`int`):
            Turns whose calls run at once; 0 runs them in the main thread, one after another.
        timeout (`float`, *optional*):
            Seconds that one call may take.
        loop (`asyncio.AbstractEventLoop`, *optional*):
            Running loop for asynchronous tools; one is started where it is needed and missing.
    """

    def __init__(
        self, workers: int, timeout: float | None = None, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._workers = Workers(workers)
        self._timeout = timeout
        self._loop = loop
        self._told: set[str] = set()
        self._worked: set[str] = set()
        self._awaited: set[Future[list[object]]] = set()
        self._num_ends = 0
        self._ends_before = threading.local()  # of the work that a thread does
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Run something beside the sampler."""
        num_ends = self._num_ends

        def run() -> T:
            self._ends_before.count = num_ends
            try:
                return work()
            finally:
                del self._ends_before.count

        return self._workers.submit(run)

    def _check_wanted(self) -> None:
        """
        Raises:
            CancelledError: if this thread does what was submitted before the last `end`.
        """
        if getattr(self._ends_before, "count", self._num_ends) != self._num_ends:
            raise CancelledError

    def end(self) -> bool:
        """Cancel what waits and end the threads, after a few seconds for calls that run; whether all have ended."""
        with self._lock:
            self._num_ends += 1
            awaited = list(self._awaited)
        for future in awaited:
            future.cancel()
        return self._workers.end(_GRACE)

    def run(self, calls: Sequence[Message], tools: Mapping[str, Tool], fragile: Collection[str] = ()) -> CallResults:
        """
        Run the calls of one turn, in their order. Asynchronous calls that follow each other run together.

        Args:
            calls (sequence of `dict`):
                `tool_calls` of a message.
            tools (mapping):
                Tools by name.
            fragile (collection of `str`):
                Names of tools that leave something in an unknown state if they are given up.

        Raises:
            ToolThreadError: if a tool works in the main thread alone.
            EnvironmentLostError: if the time of a fragile tool is over.
            CancelledError: if the calls were given up by `end`.
        """
        values: list[object] = [None] * len(calls)
        together: list[tuple[int, Awaitable[object]]] = []
        for i, call in enumerate(calls):
            self._check_wanted()
            try:
                tool, arguments = _tool_of(call, tools)
                if inspect.iscoroutinefunction(tool):
                    together.append((i, tool(**arguments)))
                    continue
                self._gather(together, values)
                self._check_wanted()
                values[i] = within(self._timeout, lambda tool=tool, arguments=arguments: tool(**arguments))
            except Exception as error:
                self._check_wanted()
                self._gather(together, values)
                values[i] = _Failure(error)
        self._gather(together, values)
        return self._checked(calls, values, tools, fragile)

    def _checked(
        self, calls: Sequence[Message], values: list[object], tools: Mapping[str, Tool], fragile: Collection[str]
    ) -> CallResults:
        found = CallResults()
        for call, value in zip(calls, values, strict=True):
            name = _name_of(call)
            if isinstance(value, _Failure):
                error = value.error
                if isinstance(error, WorkTimeoutError):
                    error = TimeoutError(f"Tool {name} took longer than {self._timeout} seconds.")
                    if name in fragile:
                        raise EnvironmentLostError(str(error))
                if name in tools:
                    self._tell(call, error)
                found.num_failures += 1
                value = {"error": str(error)}
            else:
                self._worked.add(name)
            found.results.append((name, value))
        return found

    def _gather(self, together: list[tuple[int, Awaitable[object]]], values: list[object]) -> None:
        """Wait for asynchronous calls, and put their results to their places."""
        if not together:
            return
        timeout, waiting = self._timeout, list(together)
        together.clear()

        async def one(call: Awaitable[object]) -> object:
            limit = asyncio.timeout(timeout)
            try:
                async with limit:
                    return await call
            except TimeoutError as error:
                return _Failure(WorkTimeoutError() if limit.expired() else error)
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise
                return _Failure(RuntimeError("The tool was cancelled."))  # by itself
            except Exception as error:
                return _Failure(error)

        async def all_of_them() -> list[object]:
            return await asyncio.gather(*(one(call) for _, call in waiting))

        for (i, _), value in zip(waiting, self._on_loop(all_of_them()), strict=True):
            values[i] = value

    def _on_loop(self, work: Coroutine[Any, Any, list[object]]) -> list[object]:
        with self._lock:
            try:
                self._check_wanted()
            except CancelledError:
                work.close()
                raise
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="async tools", daemon=True).start()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._awaited.add(future)
        try:
            return future.result()
        except BaseException:  # Ctrl-C
            future.cancel()
            raise
        finally:
            with self._lock:
                self._awaited.discard(future)

    def _tell(self, call: Message, error: Exception) -> None:
        """Log the first failure of each tool: the model alone sees the others."""
        name, asked = _name_of(call), str(call)
        about_threads = any(words in str(error) and words not in asked for words in _THREAD_WORDS)
        if about_threads and name not in self._worked and self._workers.count > 0:
            raise ToolThreadError(
                f"The tool '{name}' was called in a thread and failed: {error}. Set `tool_workers=0`, which calls "
                "tools in the main thread, one after another."
            ) from error
        with self._lock:
            is_new = name not in self._told
            self._told.add(name)
        if is_new:
            logger.warning(
                "The tool '%s' has failed: %r. The model gets the error as its answer, as in GRPOTrainer. It is said "
                "once per tool.",
                name,
                error,
                exc_info=error,
            )


def tools_by_name(tools: Iterable[Tool], environment: object | None = None) -> dict[str, Tool]:
    """Tools by the names that the model calls them by, those of an environment last."""
    methods = [] if environment is None else [getattr(environment, name) for name in public_methods(type(environment))]
    return {cast(Any, tool).__name__: tool for tool in (*tools, *methods)}


def public_methods(environment: type) -> list[str]:
    """Names of the methods of an environment that are tools, as GRPOTrainer finds them."""
    names = [name for name, _ in inspect.getmembers(environment, predicate=inspect.isfunction)]
    return [name for name in names if name not in ("reset", "get_reward") and not name.startswith("_")]


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _name_of(call: Message) -> str:
    return call["function"]["name"] if call["type"] == "function" else call.get("name", "unknown")


def _tool_of(call: Message, tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, object]]:
    if call["type"] != "function":
        raise ValueError(f"Unsupported tool call type: {call['type']}")
    name = call["function"]["name"]
    if name not in tools:
        raise ValueError(f"Tool {name} not found.")
    return tools[name], call["function"]["arguments"]
