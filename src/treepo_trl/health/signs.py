"""
The signs of illnesses: functions that look at the end of a history. Standard library only.

None of them raises, whatever was logged. Each number is in a text of `rules.py` too, which takes it from here.
"""

import math
from dataclasses import dataclass
from statistics import fmean, pvariance, variance

from .history import History


WINDOW = 5
"""Logs over which a lasting state is averaged, at the end of the training and at its start."""
EQUAL, ALL_EQUAL = 0.9, 0.95  # fractions of the prompts
PROMPTS = 40
"""Prompts over which such a fraction is averaged, at least. Of a single prompt, each log says 0 or 1."""
SOLVED = 20  # logs
SPLIT = 0.25  # deviation of rewards, in units of their range
CUT, REPEATED = 0.3, 0.2  # fractions of the completions
SHARED = 1.1  # leaf tokens per unique token
DISTANCE, NEAR = 0.1, 3  # nats per token, logs
NOT_FINITE = 20  # steps: by design fp16 skips one per halving of its scale, and 16 lead from 65536 to 1
LONGER, ERRORS = 1.5, 3  # times the length at the start; standard errors
CORRELATION = 0.5
GAIN = 0.1  # deviations of the reward


@dataclass(frozen=True)
class Sighting:
    """An illness in a history."""

    seen: str
    severity: float = 1.0
    """Above 0. Twice as much is told of again."""


# Windows


def _last(values: list[float], count: int = WINDOW) -> float | None:
    """Mean of the last values, `None` if there are not as many."""
    return fmean(values[-count:]) if len(values) >= count else None


def _start_and_end(values: list[float]) -> tuple[float, float] | None:
    """Means of the first and of the last window, `None` while they overlap."""
    return (fmean(values[:WINDOW]), fmean(values[-WINDOW:])) if len(values) >= 2 * WINDOW else None


def _is_more_than_noise(values: list[float]) -> bool:
    """Whether the last window is above the first one by several standard errors of their difference."""
    start, end = values[:WINDOW], values[-WINDOW:]
    error = math.sqrt((variance(start) + variance(end)) / WINDOW)
    return fmean(end) - fmean(start) > ERRORS * error


# Rewards


EQUAL_METRICS = ("tree/equal_rewards_frac", "frac_reward_zero_std")


def _prompts_of_log(history: History) -> float:
    """Prompts that a log stands for, at least: from their number, or from the steps in which their fraction moves."""
    recent = history.known(*EQUAL_METRICS)[-PROMPTS:]
    told = (history.known("tree/prompts") or [1.0])[-1]
    for count in range(1, PROMPTS):
        if all(abs(value * count - round(value * count)) < 1e-4 for value in recent):
            return max(1.0, told, count)
    return PROMPTS


def _window(history: History) -> int:
    """Logs of enough prompts."""
    return max(WINDOW, math.ceil(PROMPTS / _prompts_of_log(history)))


def _equal_rewards(history: History, count: int, least: float) -> str | None:
    equal, reward = _last(history.known(*EQUAL_METRICS), count), _last(history.known("reward"), count)
    if equal is None or reward is None or equal < least:
        return None
    seen = f"in {equal:.0%} of the prompts all completions had the same reward, over {count} logs"
    return f"{seen}, at a mean reward of {reward:.3g}"


def _moments(history: History, count: int) -> tuple[float, float]:
    """Mean and deviation of the rewards of the last logs: that within logs and, of few prompts, that between them."""
    rewards, within = history.known("reward")[-count:], history.known("reward_std")[-count:]
    if not rewards:
        return 0.0, 0.0
    return fmean(rewards), math.sqrt(pvariance(rewards) + (fmean(each**2 for each in within) if within else 0.0))


def _scale(history: History, count: int) -> tuple[float, float]:
    """Lowest reward and range of rewards, as far as the logs tell. 0 is taken for one of the rewards."""
    rewards = history.known("reward")
    mean, deviation = _moments(history, count)
    lowest, highest = min([0.0, *rewards]), max([0.0, *rewards])
    # Means do not show the range while all are near 0. Of rewards that are 0 or R, R is the second moment over the
    # mean: above 0, or below it where all are penalties.
    other = (mean**2 + deviation**2) / mean if mean else 0.0
    if mean > 0:
        highest = max(highest, other)
    elif highest == 0:
        lowest = min(lowest, other)
    return lowest, highest - lowest


def _is_high(rewards: list[float], history: History, count: int) -> bool:
    """Whether the mean of rewards is in the upper half of the range."""
    lowest, extent = _scale(history, count)
    return bool(rewards) and fmean(rewards) > lowest + extent / 2


def _is_split(history: History, count: int) -> bool:
    """Whether the rewards of different prompts differ much, beside their range."""
    deviation = _moments(history, count)[1]
    return deviation > 0 and deviation >= SPLIT * _scale(history, count)[1]


def too_hard(history: History) -> Sighting | None:
    count = _window(history)
    seen = _equal_rewards(history, count, EQUAL)
    if seen is None or _is_split(history, count) or _is_high(history.known("reward")[-count:], history, count):
        return None
    return Sighting(seen)


def too_easy(history: History) -> Sighting | None:
    rewards, count = history.known("reward"), _window(history)
    # What was learned in this training was not too easy. It is told when nothing is left to learn for long.
    was_high = _is_high(rewards[:count], history, count)
    seen = _equal_rewards(history, count if was_high else max(SOLVED, count), EQUAL)
    if seen is None or _is_split(history, count) or not _is_high(rewards[-count:], history, count):
        return None
    return Sighting(seen)


def all_or_nothing(history: History) -> Sighting | None:
    count = _window(history)
    seen = _equal_rewards(history, count, ALL_EQUAL)
    if seen is None or not _is_split(history, count):
        return None
    return Sighting(f"{seen}, and prompts differ")


def unscored(history: History) -> Sighting | None:
    rewards = history.logged("reward")
    if len(rewards) >= 2 and all(_is_missing(value) for value in rewards[-2:]):
        return Sighting("no reward function scored any completion, in 2 logs one after the other", 2.0)
    names = history.names("rewards/", "/mean")
    silent = [name for name in names if _is_silent(history.logged(name))]
    if not silent:
        return None
    words = ", ".join(name.removeprefix("rewards/").removesuffix("/mean") for name in silent)
    return Sighting(f"{words} returned None for every completion of {WINDOW} logs", 0.5)


def _is_silent(values: list[float | None]) -> bool:
    return len(values) >= WINDOW and all(_is_missing(value) for value in values[-WINDOW:])


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


# Completions


def cut(history: History) -> Sighting | None:
    cut = _last(history.known("tree/finish_length_frac", "completions/clipped_ratio"))
    if cut is None or cut < CUT:
        return None
    return Sighting(f"{cut:.0%} of the completions were cut at the cap on their length, over {WINDOW} logs", cut)


def repeated(history: History) -> Sighting | None:
    repeated = _last(history.known("tree/finish_repetition_frac"))
    if repeated is None or repeated < REPEATED:
        return None
    return Sighting(f"{repeated:.0%} of the completions ended in a repetition, over {WINDOW} logs", repeated)


def longer(history: History) -> Sighting | None:
    known = history.known("tree/mean_length", "completions/mean_length")
    lengths, rewards = _start_and_end(known), _start_and_end(history.known("reward"))
    if lengths is None or rewards is None or lengths[1] < LONGER * lengths[0] or not _is_more_than_noise(known):
        return None
    seen = f"their mean length rose from {lengths[0]:.0f} to {lengths[1]:.0f} tokens"
    severity = lengths[1] / max(lengths[0], 1.0)
    correlation = _last(history.known("tree/length_reward_correlation"))
    if correlation is not None and correlation >= CORRELATION:
        seen += f", and the longer ones of a prompt get more reward (correlation {correlation:.2f})"
        return Sighting(seen, severity)
    deviation = _last(history.known("reward_std")) or 0.0
    if rewards[1] - rewards[0] <= GAIN * deviation:
        return Sighting(f"{seen}, and the reward went from {rewards[0]:.3g} to {rewards[1]:.3g}", severity)
    return None


def not_shared(history: History) -> Sighting | None:
    ratio = _last(history.known("tree/leaf_unique_ratio"))
    if ratio is None or ratio >= SHARED:
        return None
    return Sighting(f"a sampled token is in {ratio:.2f} completions on average, over {WINDOW} logs")


# The update


def engine_is_far(history: History) -> Sighting | None:
    values = history.known("engine/logp_difference_mean", "sampling/sampling_logp_difference/mean")
    distance = _last(values, NEAR)
    if distance is None or distance <= DISTANCE:
        return None
    seen = f"its log-probabilities differ by {distance:.3f} nats per token, over {NEAR} logs"
    return Sighting(seen, distance)


def gradient_is_not_finite(history: History) -> Sighting | None:
    last = history.logged("grad_norm")[-NEAR:]
    steps = history.step - [0, *history.steps("grad_norm")[-1:]][-1]
    if len(last) < NEAR or steps < NOT_FINITE or any(value is None or math.isfinite(value) for value in last):
        return None
    return Sighting(f"its norm is {last[-1]}, and none was finite in {steps} steps")


def not_moving(history: History) -> Sighting | None:
    rates = history.known("learning_rate")
    if len(rates) >= WINDOW and not any(rates[-WINDOW:]):
        return Sighting(f"the learning rate was 0 in {WINDOW} logs one after the other")
    gradients = history.known("grad_norm", "loss")
    equal = _last(history.known(*EQUAL_METRICS))
    if len(gradients) < WINDOW or any(gradients[-WINDOW:]) or (equal is not None and equal >= EQUAL):
        return None
    return Sighting(f"the gradient was 0 in {WINDOW} logs one after the other, though rewards differ")
