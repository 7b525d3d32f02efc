"""Reward functions that fail, hang, or give what is no reward: each is named, and nothing is learned from it."""

import asyncio
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState

from tests.support.fake_vllm import until
from tests.support.models import make_model
from tests.support.trainers import build, change, logs_of, make_config, parity_reward, plain_prompts, trained
from treepo_trl import TreePOTrainer
from treepo_trl.scoring import reward_watch
from treepo_trl.scoring.reward_watch import TimeIsUpError, checked_rewards, ended_after, told_while_running


# What a function returns


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.0, True, None],
        (1, 2.0, True, None),
        (value for value in [1, 2.0, True, None]),
        [torch.tensor(1), np.float32(2), np.bool_(True), None],
        [torch.ones(1), torch.full((1, 1), 2.0), 1, None],
    ],
    ids=["list", "tuple", "generator", "scalars", "tensors of one"],
)
def test_lists_of_numbers(returned: Any) -> None:
    assert checked_rewards(returned, "f", 4) == [1.0, 2.0, 1.0, None]


def test_arrays_of_numbers() -> None:
    assert checked_rewards(torch.arange(3), "f", 3) == checked_rewards(np.arange(3), "f", 3) == [0.0, 1.0, 2.0]
    assert checked_rewards(torch.arange(3)[:, None], "f", 3) == [0.0, 1.0, 2.0]  # logits of one label


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"returned None \(is a `return` missing\?\)"),
        (1.0, "returned a value of type float"),
        ("12", "returned a value of type str"),
        ({0: 1.0, 1: 2.0}, "returned a value of type dict"),
        ({1.0, 2.0}, "returned a value of type set"),
        ([1.0], "returned 1 values"),
        ([1.0] * 3, "returned 3 values"),
        (torch.tensor(1.0), "returned a value of type Tensor"),
        (np.array(1.0), "returned a value of type ndarray"),
        (np.ones((2, 1)), r"returned array\(\[1.\]\) for completion 0"),
        (torch.ones(2, 2), r"returned tensor\(\[1., 1.\]\) for completion 0"),
        (torch.ones(3, 2), "returned 3 values"),
        ([1.0, "1"], "returned '1' for completion 1"),
        ([1.0, [1.0]], r"returned \[1.0\] for completion 1"),
        ([1.0, np.ones(1)], r"returned array\(\[1.\]\) for completion 1"),
        ([1j, 1.0], "returned 1j for completion 0"),
    ],
    ids=repr,
)
def test_what_is_no_list_of_numbers(returned: Any, message: str) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=rf"The reward function 'f' {message}.*Expected is a list of 2 num"
    ):
        checked_rewards(returned, "f", 2)


# In a training


def fails(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("answer")


async def fails_later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    raise KeyError("answer")


@pytest.mark.parametrize("function", [fails, fails_later])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_function_that_raises_is_named(tmp_path: Path, function: Callable[..., Any], rounds: int) -> None:
    config = make_config(tmp_path, dynamic_sampling_rounds=rounds)
    with pytest.raises(KeyError, match="answer") as caught:
        trained(TreePOTrainer, make_model(), config, reward_funcs=[parity_reward, function])
    assert caught.value.__notes__ == [f"Raised by the reward function '{function.__name__}' in step 0."]
    assert caught.traceback[-1].name == function.__name__


def test_evaluation_names_functions_too(tmp_path: Path) -> None:
    trainer = build(
        TreePOTrainer, make_model(), make_config(tmp_path), eval_dataset=plain_prompts(2), reward_funcs=fails
    )
    with pytest.raises(KeyError) as caught:
        trainer.evaluate()
    assert caught.value.__notes__ == ["Raised by the reward function 'fails' in step 0."]


def test_the_trainer_keeps_its_functions(tmp_path: Path) -> None:
    seen = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    class Looking(TreePOTrainer):
        def _calculate_rewards(self, *args: Any) -> Any:
            seen.append(self.reward_funcs[0])
            return super()._calculate_rewards(*args)

    trainer = trained(Looking, make_model(), make_config(tmp_path, max_steps=1), reward_funcs=[reward])
    assert trainer.reward_funcs == seen == [reward]


# Rewards that would ruin the weights


@pytest.mark.parametrize(
    ("value", "changes"),
    [
        (3e38, {"advantage_estimator": "grpo"}),
        (float("inf"), {"advantage_estimator": "treepo"}),
        (-1e300, {"dynamic_sampling_rounds": 1}),
    ],
    ids=str,
)
def test_an_unusable_reward_is_none(
    tmp_path: Path, value: float, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, logs and advantages are those of a function that returns `None` there, and one warning says why."""

    def reward_with(first: float | None) -> Any:
        def one_is_off(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            return [first, *parity_reward(completion_ids)[1:]]

        config = make_config(tmp_path, **changes)
        return trained(TreePOTrainer, make_model(), config, reward_funcs=[one_is_off, parity_reward])

    off, none = reward_with(value), reward_with(None)
    assert change(off) > 0
    for a, b in zip(off.model.parameters(), none.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("reward", "rewards/one_is_off/mean", "rewards/one_is_off/std", "grad_norm"):
        assert logs_of(off, name) == logs_of(none, name)
    (warning,) = [record.message for record in caplog.records if "must be finite" in record.message]
    given = re.escape(f"{torch.tensor(value).item():g}")
    assert re.search(
        rf"'one_is_off' gave {given} in step 0, .* prompt 'w\d+.*'\. .* \(1 of 8 in this batch\)", warning
    )


def test_no_reward_at_all_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def nothing(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    trainer = trained(TreePOTrainer, make_model(), make_config(tmp_path), reward_funcs=nothing)
    assert change(trainer) == 0
    (_,) = [r for r in caplog.records if "No reward function (nothing) has scored any completion" in r.message]


# Time


def sleeps(completions: list[str], **_: Any) -> list[float]:
    time.sleep(120)
    return [0.0] * len(completions)


def searches(completions: list[str], **_: Any) -> list[float]:
    """Computes in C without letting another thread run."""
    re.match(r"(a+)+$", "a" * 60 + "b")
    return [0.0] * len(completions)


def catches(completions: list[str], **_: Any) -> list[float]:
    while True:
        try:
            time.sleep(120)
        except Exception:
            return [0.0] * len(completions)


async def waits(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(120)
    return [0.0] * len(completions)


@pytest.mark.parametrize("function", [sleeps, searches, catches, waits])
def test_a_function_that_hangs_is_ended(tmp_path: Path, function: Callable[..., Any]) -> None:
    trainer = build(TreePOTrainer, make_model(), make_config(tmp_path, reward_timeout=0.3), reward_funcs=function)
    before, start = signal.getsignal(signal.SIGVTALRM), time.monotonic()
    message = (
        rf"`reward_timeout=0.3` seconds are over, and the reward function '{function.__name__}' in step 0 has not"
    )
    with pytest.raises(TimeoutError, match=message) as caught:
        trainer.train()
    assert time.monotonic() - start < 100
    if function is not waits:  # which runs in another thread
        assert caught.value.__cause__ is not None  # shows where it was
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_function_may_use_alarms(tmp_path: Path) -> None:
    rung = []

    def alarmed(completions: list[str], **_: Any) -> list[float]:
        before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.1)
        signal.signal(signal.SIGALRM, before)
        return [0.0] * len(completions)

    trained(TreePOTrainer, make_model(), make_config(tmp_path, max_steps=1, reward_timeout=300), reward_funcs=alarmed)
    assert rung == [True]


def test_a_timeout_of_the_function_itself_is_its_own(tmp_path: Path) -> None:
    def times_out(completions: list[str], **_: Any) -> list[float]:
        raise TimeoutError("the judge does not answer")

    with pytest.raises(TimeoutError, match="the judge does not answer") as caught:
        trained(TreePOTrainer, make_model(), make_config(tmp_path, reward_timeout=300), reward_funcs=times_out)
    assert caught.value.__notes__ == ["Raised by the reward function 'times_out' in step 0."]


def test_who_swallows_the_end_is_ended_again() -> None:
    caught = 0

    def swallow_two() -> None:
        nonlocal caught
        while caught < 2:
            try:
                time.sleep(30)
            except BaseException:
                caught += 1
        time.sleep(30)

    with pytest.raises(TimeIsUpError), ended_after(0.1):
        swallow_two()


def test_a_thread_that_cannot_be_interrupted_is_told_before_it_trains(tmp_path: Path) -> None:
    """Not at the first call of a reward function, behind a batch of trees."""
    asked: list[str] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        asked.extend(completions)
        return [0.0] * len(completions)

    trainer = build(TreePOTrainer, make_model(), make_config(tmp_path, reward_timeout=1.0), reward_funcs=reward)
    with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError, match=r"reward_timeout=1` .*main thread"):
        threads.submit(trainer.train).result()
    assert trainer.state.global_step == 0
    assert asked == []


def test_a_long_call_is_said_at_doubling_times(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    PartialState()  # accelerate's logger wants it
    waits: list[float] = []

    class Hurried(threading.Event):
        """Lets no time pass in the first three waits."""

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return super().wait(0.0 if len(waits) <= 3 else 120.0)

    monkeypatch.setattr(reward_watch, "threading", SimpleNamespace(Event=Hurried, Thread=threading.Thread))
    num_threads = threading.active_count()
    with told_while_running("the reward function 'f' in step 3"):
        until(lambda: len(waits) == 4)
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    for message, seconds in zip(said, (60, 120, 240), strict=True):
        assert f"Still waiting for the reward function 'f' in step 3, after {seconds} seconds." in message
    assert list(accumulate(waits)) == [60, 120, 240, 480]
    assert threading.active_count() == num_threads
