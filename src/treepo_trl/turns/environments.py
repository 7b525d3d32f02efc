"""
Environments in trees: one per path, in the state that the calls on it have made.

An environment is reset once per tree. Where paths part behind a call, each further one gets a fork of the environment,
a deep copy, or a fresh one in which the calls so far are replayed. Standard library only.
"""

import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from treepo_trl.sampling.nodes import Message
from treepo_trl.sampling.tree import SegmentTree

from .tool_runner import CallResults, EnvironmentLostError, Tool, ToolRunner, public_methods, tools_by_name


EnvironmentForking = Literal["auto", "none", "deepcopy", "replay"]
"""Choices of the setting `environment_forking`."""
Forking = Literal["fork", "deepcopy", "replay", "none"]
"""How a path gets an environment in the state of its prefix."""
State = tuple[int, ...]
"""The segments of a path that have called the environment."""


class EnvironmentReplayError(RuntimeError):
    """The same calls on a fresh environment gave other answers."""


class RandomResetError(ValueError):
    """Two resets with the same arguments gave different tasks, and nothing can fork the environment."""


class Environment(Protocol):
    """What every environment has; its other public methods are tools."""

    def reset(self, **kwargs: object) -> object: ...


def forking_of(environment: type, setting: EnvironmentForking) -> Forking:
    """How the environments of a class are given to paths: as it is set, and by what the class defines."""
    if callable(getattr(environment, "_fork", None)) and setting == "auto":
        return "fork"
    if setting == "auto":
        return "deepcopy" if callable(getattr(environment, "__deepcopy__", None)) else "none"
    return setting


@dataclass
class ForkingCounts:
    """What environments have cost."""

    num_resets: int = 0
    num_forks: int = 0
    num_replayed_calls: int = 0


@dataclass
class Execution:
    """Calls that were run on an environment, and what it has become."""

    state: State
    """Before the calls."""
    calls: Sequence[Message]
    found: CallResults
    texts: Sequence[str]
    """What was answered then: a result may be an object that later calls change."""
    environment: Environment
    """After the calls."""


class EnvironmentPool:
    """
    Environments of one class that are used again and again.

    Args:
        factory (`Callable[[], Environment]`):
            Makes one.
        idle (`list[Environment]`):
            Those that nobody uses.
    """

    def __init__(self, factory: Callable[[], Environment], idle: list[Environment]) -> None:
        self._factory, self._idle = factory, idle
        self._lock = threading.Lock()
        self.counts = ForkingCounts()

    def acquire(self, kwargs: Mapping[str, object]) -> tuple[Environment, object]:
        """An environment after a reset, and its observation."""
        with self._lock:
            self.counts.num_resets += 1
            environment = self._idle.pop() if self._idle else None
        if environment is None:
            environment = self._factory()
        return environment, environment.reset(**copy.deepcopy(dict(kwargs)))  # it may use its row up

    def count(self, forks: int = 0, replayed_calls: int = 0) -> None:
        """Count what was done in threads."""
        with self._lock:
            self.counts.num_forks += forks
            self.counts.num_replayed_calls += replayed_calls

    def release(self, environment: Environment) -> None:
        """Take an environment back."""
        with self._lock:
            self._idle.append(environment)


@dataclass
class EnvironmentTree:
    """
    The environments of one tree's paths.

    Args:
        pool ([`EnvironmentPool`]):
            Where environments come from.
        forking (`str`):
            How paths that part get theirs.
        runner ([`ToolRunner`]):
            Runs the calls.
        standalone (sequence of functions):
            Tools that belong to no environment.
    """

    pool: EnvironmentPool
    forking: Forking
    runner: ToolRunner
    standalone: Sequence[Tool]
    _kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    _observation: object = None
    _instances: dict[State, Environment] = field(default_factory=dict[State, Environment])
    _executed: dict[int, Execution] = field(default_factory=dict[int, Execution])
    """Segment -> its calls on the environment."""
    _lost: set[int] = field(default_factory=set[int])
    _unknown: set[State] = field(default_factory=set[State])
    """States that were lost when they were replayed."""
    _pooled: list[Environment] = field(default_factory=list[Environment])
    _copies: list[Environment] = field(default_factory=list[Environment])
    _busy: list[Environment] = field(default_factory=list[Environment])
    """In a call, or left in one."""
    _spare: list[Environment] = field(default_factory=list[Environment])
    """After the reset, and nobody's yet."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Never held while code of an environment runs, which may take its time."""
    _forked: dict[State, threading.Lock] = field(default_factory=dict[State, threading.Lock])
    """An environment is forked by one thread at a time."""
    _methods: Collection[str] = ()

    def observation(self, kwargs: Mapping[str, object]) -> object:
        """What the reset of the tree's environment gives: it is reset when this is asked for the first time."""
        if not self._pooled:
            self._kwargs = dict(kwargs)
            environment, self._observation = self.pool.acquire(self._kwargs)
            self._pooled.append(environment)
            self._instances[()] = environment
            self._methods = public_methods(type(environment))
        return copy.deepcopy(self._observation)

    @property
    def can_part(self) -> bool:
        """Whether paths may part behind the prompt: each gets a state of its own, or there is nothing to change."""
        return self.forking != "none" or not self._methods

    def is_called(self, calls: Sequence[Message]) -> bool:
        """Whether some of the calls are on the environment."""
        return any(call["type"] == "function" and call["function"]["name"] in self._methods for call in calls)

    def state_of(self, tree: SegmentTree, node: int | None) -> State:
        """The state that the path to a node has made."""
        return tuple(each for each in tree.path(node) if each in self._executed or each in self._lost)

    def execute(self, state: State, calls: Sequence[Message]) -> Execution:
        """
        Run calls on an environment in a state. Called in a thread.

        Raises:
            EnvironmentLostError: if a call takes too long.
            EnvironmentReplayError: if a replay does not repeat.
            RandomResetError: if a fresh environment has another task.
        """
        environment = self._to_change(state)
        found = self._run(environment, calls, tools_by_name(self.standalone, environment))
        return Execution(state, calls, found, [str(value) for _, value in found.results], environment)

    def _run(self, environment: Environment, calls: Sequence[Message], tools: Mapping[str, Tool]) -> CallResults:
        """Run calls on an environment. It stays busy if one is given up: nobody knows what goes on in it."""
        with self._lock:
            self._busy.append(environment)
        found = self.runner.run(calls, tools, self._methods)
        with self._lock:
            self._busy = [each for each in self._busy if each is not environment]
        return found

    def _to_change(self, state: State) -> Environment:
        """An environment in a state that nobody else has."""
        if self.forking in ("fork", "deepcopy"):
            return self._copy_of(state)
        with self._lock:
            environment = self._instances.pop(state, None)
        return self._replayed(state) if environment is None else environment

    def _copy_of(self, state: State) -> Environment:
        """
        A fork or a copy of the environment in a state.

        Raises:
            TypeError: if the author's method has not returned another environment of the class.
        """
        with self._lock:
            environment, turn = self._instances[state], self._forked.setdefault(state, threading.Lock())
        with turn:
            is_fork = self.forking == "fork"
            made = cast(Any, environment)._fork() if is_fork else copy.deepcopy(environment)
        if made is environment or type(made) is not type(environment):
            name = type(environment).__name__
            raise TypeError(
                f"`{'_fork' if is_fork else '__deepcopy__'}` of {name} has returned "
                f"{'itself' if made is environment else repr(made)}. Return another {name} in the same state."
            )
        self.pool.count(forks=1)
        with self._lock:
            self._copies.append(made)
        return made

    def _replayed(self, state: State) -> Environment:
        """A fresh environment in which the calls so far are run again."""
        with self._lock:
            spare = self._spare.pop() if self._spare else None
        environment = self._fresh() if spare is None else spare
        tools = tools_by_name((), environment)
        for node in state:
            before = self._executed[node]
            pairs = zip(before.calls, before.texts, strict=True)
            wanted = [(call, text) for call, text in pairs if self.is_called([call])]
            found = self._run(environment, [call for call, _ in wanted], tools)
            self.pool.count(replayed_calls=len(wanted))
            for (call, then), (_, now) in zip(wanted, found.results, strict=True):
                if str(now) != then:
                    raise EnvironmentReplayError(
                        f"The call {call['function']} was run again on a fresh {type(environment).__name__}, and it "
                        f"answered {str(now)!r}; before it was {then!r}. `environment_forking='replay'` needs "
                        "environments that repeat themselves: take the seed of what is random from the example, or "
                        "define `_fork`."
                    )
        return environment

    def _fresh(self) -> Environment:
        """
        Another environment after the tree's reset.

        Raises:
            RandomResetError: if its observation is another one.
        """
        environment, observation = self._reset_again()
        if str(observation) != str(self._observation):
            raise RandomResetError(
                f"`reset` of {type(environment).__name__} gave {observation!r}, and {self._observation!r} before with "
                "the same arguments. A tree has one prompt. Put a seed into the example, or define `_fork`, so that "
                "all paths of a tree come from one reset."
            )
        return environment

    def _reset_again(self) -> tuple[Environment, object]:
        environment, observation = self.pool.acquire(self._kwargs)
        with self._lock:
            self._pooled.append(environment)
        return environment, observation

    def check_reset(self) -> None:
        """Raise `RandomResetError` unless a second reset repeats the first, if paths need one."""
        if self._methods and self.forking in ("replay", "none"):
            self._spare.append(self._fresh())

    def keep(self, node: int, execution: Execution) -> None:
        """Keep the environment of a path behind the segment that has called it."""
        self._executed[node] = execution
        with self._lock:
            self._instances[(*execution.state, node)] = execution.environment

    def lose(self, node: int) -> None:
        """The environment behind a segment is in a state that nobody knows."""
        self._lost.add(node)

    # The end of a batch

    def leaf_environment(self, tree: SegmentTree, leaf: int) -> Environment:
        """
        The environment at the end of a path. Leaves in one state share it.

        Where it was lost, a fresh one, so that reward functions find something: the leaf ends by "timeout" and has no
        reward.
        """
        state = self.state_of(tree, leaf)
        with self._lock:
            environment = self._instances.get(state)
        if environment is None:
            try:
                if self._lost.intersection(state):
                    raise EnvironmentLostError
                environment = self._replayed(state)
            except EnvironmentLostError:
                environment, _ = self._reset_again()
                self._unknown.add(state)
            with self._lock:
                self._instances[state] = environment
        if state in self._unknown:
            tree.nodes[leaf].finish_reason = "timeout"
        return environment

    def release(self, is_failed: bool = False) -> None:
        """
        Give the environments back, and close copies, which nobody needs any more.

        Args:
            is_failed (`bool`):
                Whether something has failed: then none is used again.
        """
        with self._lock:
            pooled, copies, busy = self._pooled, self._copies, self._busy
            self._pooled, self._copies, self._instances = [], [], {}
        for environment in pooled:
            if not is_failed and not any(environment is each for each in busy):
                self.pool.release(environment)
            elif is_failed:
                copies.append(environment)
        for environment in copies:
            close = getattr(environment, "_close", None)
            if callable(close) and not any(environment is each for each in busy):
                with suppress(Exception):
                    close()
