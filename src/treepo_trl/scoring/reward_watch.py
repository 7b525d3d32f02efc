"""
Reward functions are the user's code: which of them raised, hangs, or gave what is no reward.

[`RewardWatch`] names the function in each of these cases. It runs in the main thread, as GRPOTrainer runs reward
functions, so that those which set alarms of their own go on working.
"""

import asyncio
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import cast

import torch
from accelerate.logging import get_logger
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import is_async_callable

from treepo_trl.trl.host import Host
from treepo_trl.update.rewards import LARGEST_REWARD, without_unusable

from .vacant_rows import LeafRows


logger = get_logger(__name__)

_FIRST_WARNING = 60.0  # seconds of a call; the next ones after twice as long each

Rewards = list[float | None]


class RewardWatch:
    """
    Watches the reward functions of a trainer.

    Args:
        host ([`Host`]):
            Has the functions, their names and the state of the training.
    """

    def __init__(self, host: Host) -> None:
        self._trainer = host.trainer
        self._timeout = host.args.reward_timeout
        self._told: set[str] = set()  # functions whose unusable rewards were warned about

    @property
    def _step(self) -> str:
        return f"step {self._trainer.state.global_step}"

    # The call of a function

    def functions(self, rows: LeafRows) -> list[RewardFunc]:
        """The trainer's reward functions for the rows that are leaves, each watched; reward models are not."""
        functions = list(self._trainer.reward_funcs)
        for i, (function, name) in enumerate(zip(functions, self._trainer.reward_func_names, strict=True)):
            called = cast("Callable[..., object]", function)
            if not isinstance(function, torch.nn.Module):
                called = self._watched(called, name, len(rows))
            functions[i] = cast(RewardFunc, rows.scored_by(called))
        return functions

    def _watched(self, function: Callable[..., object], name: str, num_rows: int) -> Callable[..., object]:
        if is_async_callable(function):

            async def watched_async(**columns: object) -> Rewards:
                with self._named(name):
                    async with asyncio.timeout(self._timeout):
                        returned = await cast("asyncio.Future[object]", function(**columns))
                    return checked_rewards(returned, name, num_rows)

            return watched_async

        def watched(**columns: object) -> Rewards:
            with self._named(name):
                with ended_after(self._timeout):
                    returned = function(**columns)
                return checked_rewards(returned, name, num_rows)

        return watched

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Tell of a function that takes long, and name it in what it raises."""
        started = time.monotonic()
        call = f"the reward function '{name}' in {self._step}"
        try:
            with told_while_running(call):
                yield
        except (TimeIsUpError, TimeoutError) as error:
            # A `TimeoutError` is the function's own unless the time is up.
            if self._timeout is None or time.monotonic() - started < self._timeout:
                error.add_note(f"Raised by {call}.")
                raise
            raise TimeoutError(
                f"`reward_timeout={self._timeout}` seconds are over, and {call} has not returned. See above where it "
                "was. Give it a limit of its own for each completion, raise `reward_timeout`, or leave it out."
            ) from error
        except Exception as error:
            error.add_note(f"Raised by {call}.")
            raise

    # What functions gave

    def usable(self, given: torch.Tensor, prompts: list[object]) -> torch.Tensor:
        """
        Rewards in which one that would ruin the weights is `nan`, with a warning.

        Args:
            given (`torch.Tensor` of shape `(rows of all processes, num_reward_funcs)`):
                What the functions gave.
            prompts (`list`):
                Of this process's rows.
        """
        rewards = without_unusable(given)
        first = self._trainer.accelerator.process_index * len(prompts)
        self._warn_unusable(given[first:][: len(prompts)], rewards[first:][: len(prompts)], prompts)
        if rewards.isnan().all():
            names = ", ".join(self._trainer.reward_func_names)
            self._warn_once(
                "",
                f"No reward function ({names}) has scored any completion of the batch in {self._step}: all values "
                "are None or NaN, and nothing is learned from it.",
            )
        return rewards

    def _warn_unusable(self, given: torch.Tensor, usable: torch.Tensor, prompts: list[object]) -> None:
        is_unusable = usable.isnan() & ~given.isnan()
        for column in is_unusable.any(0).nonzero().flatten().tolist():
            rows = is_unusable[:, column].nonzero().flatten().tolist()
            name = self._trainer.reward_func_names[column]
            self._warn_once(
                name,
                f"The reward function '{name}' gave {given[rows[0], column].item():g} in {self._step}, for a "
                f"completion of the prompt {textwrap.shorten(str(prompts[rows[0]]), 200)!r}. A reward must be finite "
                f"and at most {LARGEST_REWARD:g} in size. This one, and all like it ({len(rows)} of {len(prompts)} in "
                "this batch), count as None: not scored by this function. It is said once per function.",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            logger.warning(message, main_process_only=False)


def checked_rewards(returned: object, name: str, num_rows: int) -> Rewards:
    """
    What a reward function has returned, as one number or `None` per completion.

    Raises:
        TypeError: if it is no list of such values.
        ValueError: if it has another length.
    """
    num_dimensions = getattr(returned, "ndim", 1)
    if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable) or num_dimensions == 0:
        hint = " (is a `return` missing?)" if returned is None else ""
        what = "None" if returned is None else f"a value of type {type(returned).__name__}"
        raise TypeError(f"The reward function '{name}' returned {what}{hint}. {_expected(num_rows)}")
    to_list = getattr(returned, "tolist", None) if num_dimensions == 1 else None
    values = cast("list[object]", list(returned) if to_list is None else to_list())
    if len(values) != num_rows:
        raise ValueError(f"The reward function '{name}' returned {len(values)} values. {_expected(num_rows)}")
    return [None if value is None else _number(value, name, i, num_rows) for i, value in enumerate(values)]


def _number(value: object, name: str, index: int, num_rows: int) -> float:
    try:
        # As in stock GRPOTrainer: a tensor of one number is a number, an array of one is a list.
        if isinstance(value, str | bytes) or (not torch.is_tensor(value) and getattr(value, "ndim", 0) != 0):
            raise TypeError
        return float(cast(float, value))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            f"The reward function '{name}' returned {textwrap.shorten(repr(value), 100)} for completion {index}. "
            f"{_expected(num_rows)}"
        ) from None


def _expected(num_rows: int) -> str:
    return (
        f"Expected is a list of {num_rows} numbers, one for each completion, with None for a completion that it does "
        "not score."
    )


# Time


@contextmanager
def told_while_running(what: str) -> Iterator[None]:
    """Warn when the block has taken a minute, two, four and so on."""
    is_over = threading.Event()

    def tell() -> None:
        elapsed, limit = 0.0, _FIRST_WARNING
        while not is_over.wait(limit - elapsed):
            logger.warning(
                f"Still waiting for {what}, after {limit:.0f} seconds. `reward_timeout` (seconds) ends a call that "
                "takes too long.",
                main_process_only=False,
            )
            elapsed, limit = limit, 2 * limit

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class TimeIsUpError(BaseException):
    """The time of a block is over. No `Exception`, because reward functions often catch those."""


def check_interruptible(seconds: float | None) -> None:
    """
    Raise if a block could not be ended after `seconds` here.

    Raises:
        ValueError: outside of the main thread, which alone handles signals, and on Windows.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if seconds is not None and not (in_main and hasattr(signal, "pthread_kill")):
        raise ValueError(
            f"`reward_timeout={seconds:g}` interrupts a reward function by a signal, which needs a training in the "
            "main thread of the process, and no Windows. Leave it out."
        )


@contextmanager
def ended_after(seconds: float | None) -> Iterator[None]:
    """
    Raise [`TimeIsUpError`] inside of a block that takes longer, wherever it is.

    A signal interrupts the block. While the block waits, a thread sends it; while the block computes and lets no
    thread run, as a regular expression does, a timer of the process's computing time sends it. It is not SIGALRM,
    which reward functions use themselves.

    Raises:
        ValueError: where no block can be ended ([`check_interruptible`]).
    """
    if seconds is None:
        yield
        return
    check_interruptible(seconds)
    start, is_over, main = time.monotonic(), threading.Event(), threading.get_ident()

    def interrupt(*_: object) -> None:
        if not is_over.is_set() and time.monotonic() - start >= seconds:
            raise TimeIsUpError

    def send() -> None:
        wait = seconds
        while not is_over.wait(wait):
            signal.pthread_kill(main, signal.SIGVTALRM)
            wait = 1.0  # again: the block may have caught the first

    thread = threading.Thread(target=send, daemon=True)
    before = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        thread.start()
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
        try:
            yield
        finally:
            is_over.set()  # nothing is raised from here on
    finally:
        is_over.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        thread.join()
        signal.signal(signal.SIGVTALRM, before)
