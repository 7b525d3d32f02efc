"""
The rules: which logged values are no longer usual, what that means and where to look. Standard library only.

`RULES` is the one table of them. docs/health.md is made from it, and each number of its texts is the one that is used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median, variance

from .history import History


WINDOW = 5
"""Logs over which a lasting state is averaged, at the end of the training and at its start."""
_EQUAL, _SOLVED = 0.9, 20
_CUT, _REPEATED, _SHARED = 0.3, 0.2, 1.1
_DISTANCE, _DISTANCE_WINDOW = 0.1, 3
_JUMP, _BEFORE, _LEAST_BEFORE = 10, 20, 10
_GRADIENT, _KL, _KL_JUMP = 1.0, 1.0, 0.1
_ENTROPY_LOW, _ENTROPY_EQUAL, _BETWEEN = 0.1, 0.95, 0.25
_ENTROPY_HIGH, _ENTROPY_RISE = 2.0, 1.0
_HELD_OUT = 0.25
_LONGER, _CORRELATION, _GAIN, _ERRORS = 1.5, 0.5, 0.1, 3


@dataclass(frozen=True)
class Sighting:
    """An illness in a history."""

    seen: str
    severity: float = 1.0
    """Above 0. Twice as much is told of again."""


@dataclass(frozen=True)
class Rule:
    """An illness, and how it shows."""

    name: str
    illness: str
    metrics: tuple[str, ...]
    """What is read, `*` for any name; of several that mean the same, the first that is logged."""
    fires: str
    usual: str
    look_at: str
    """Settings and causes."""
    check: Callable[[History], Sighting | None]
    """Whether the end of a history shows it. Never raises, whatever was logged."""


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
    return fmean(end) - fmean(start) > _ERRORS * error


def _before(values: list[float]) -> float | None:
    """Median of the values before the last one, `None` while they are few."""
    return median(values[-_BEFORE - 1 : -1]) if len(values) > _LEAST_BEFORE else None


# Rewards


_EQUAL_METRICS = ("tree/equal_rewards_frac", "frac_reward_zero_std")


def _equal_rewards(history: History, is_high: bool, count: int = WINDOW) -> Sighting | None:
    equal, reward = _last(history.known(*_EQUAL_METRICS), count), _last(history.known("reward"), count)
    if equal is None or reward is None or equal < _EQUAL or _is_high(reward, history) is not is_high:
        return None
    seen = f"in {equal:.0%} of the prompts all completions had the same reward, over {count} logs"
    return Sighting(f"{seen}, at a mean reward of {reward:.3g}")


def _is_high(reward: float, history: History) -> bool:
    """Whether a mean reward is in the upper half of those of the training; 0 counts as one of them."""
    seen = [0.0, *history.known("reward")]
    return reward > (min(seen) + max(seen)) / 2


def _too_hard(history: History) -> Sighting | None:
    return _equal_rewards(history, is_high=False)


def _too_easy(history: History) -> Sighting | None:
    rewards = history.known("reward")
    was_high = _is_high(fmean(rewards[:WINDOW]), history) if rewards else False
    # What was learned in this training was not too easy. It is told when nothing is left to learn for long.
    return _equal_rewards(history, is_high=True, count=WINDOW if was_high else _SOLVED)


def _unscored(history: History) -> Sighting | None:
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


def _held_out_falls(history: History) -> Sighting | None:
    held_out = _by_step(history, "eval_reward")
    if len(held_out) < 3:
        return None
    best, top = max(held_out[:-2], key=lambda pair: pair[1])
    now = max(value for _, value in held_out[-2:])
    deviation = dict(_by_step(history, "eval_reward_std")).get(best, 0.0)
    fall = (top - now) / (deviation or 1.0)
    rewards, steps = history.known("reward"), history.steps("reward")
    then = _last([value for value, step in zip(rewards, steps, strict=True) if step <= best])
    end = _last(rewards)
    if fall < _HELD_OUT or then is None or end is None or end <= then:
        return None
    seen = (
        f"since step {best} the reward rose from {then:.3g} to {end:.3g}, and the held-out reward fell from {top:.3g}"
    )
    return Sighting(f"{seen} to {now:.3g}", fall)


def _by_step(history: History, name: str) -> list[tuple[int, float]]:
    """Step and mean value of each evaluation: several datasets are logged at one step."""
    values: dict[int, list[float]] = {}
    for step, value in zip(history.steps(name), history.known(name), strict=True):
        values.setdefault(step, []).append(value)
    return [(step, fmean(each)) for step, each in values.items()]


# Completions


def _cut(history: History) -> Sighting | None:
    cut = _last(history.known("tree/finish_length_frac", "completions/clipped_ratio"))
    if cut is None or cut < _CUT:
        return None
    return Sighting(f"{cut:.0%} of the completions were cut at the cap on their length, over {WINDOW} logs", cut)


def _repeated(history: History) -> Sighting | None:
    repeated = _last(history.known("tree/finish_repetition_frac"))
    if repeated is None or repeated < _REPEATED:
        return None
    return Sighting(f"{repeated:.0%} of the completions ended in a repetition, over {WINDOW} logs", repeated)


def _longer(history: History) -> Sighting | None:
    known = history.known("tree/mean_length", "completions/mean_length")
    lengths, rewards = _start_and_end(known), _start_and_end(history.known("reward"))
    if lengths is None or rewards is None or lengths[1] < _LONGER * lengths[0] or not _is_more_than_noise(known):
        return None
    seen = f"their mean length rose from {lengths[0]:.0f} to {lengths[1]:.0f} tokens"
    severity = lengths[1] / max(lengths[0], 1.0)
    correlation = _last(history.known("tree/length_reward_correlation"))
    if correlation is not None and correlation >= _CORRELATION:
        seen += f", and the longer ones of a prompt get more reward (correlation {correlation:.2f})"
        return Sighting(seen, severity)
    deviation = _last(history.known("reward_std")) or 0.0
    if rewards[1] - rewards[0] <= _GAIN * deviation:
        return Sighting(f"{seen}, and the reward went from {rewards[0]:.3g} to {rewards[1]:.3g}", severity)
    return None


def _not_shared(history: History) -> Sighting | None:
    ratio = _last(history.known("tree/leaf_unique_ratio"))
    if ratio is None or ratio >= _SHARED:
        return None
    return Sighting(f"a sampled token is in {ratio:.2f} completions on average, over {WINDOW} logs")


# The update


def _engine_is_far(history: History) -> Sighting | None:
    values = history.known("engine/logp_difference_mean", "sampling/sampling_logp_difference/mean")
    distance = _last(values, _DISTANCE_WINDOW)
    if distance is None or distance <= _DISTANCE:
        return None
    seen = f"its log-probabilities differ by {distance:.3f} nats per token, over {_DISTANCE_WINDOW} logs"
    return Sighting(seen, distance)


def _gradient_jumps(history: History) -> Sighting | None:
    logged, known = history.logged("grad_norm"), history.known("grad_norm")
    if logged and logged[-1] is not None and not math.isfinite(logged[-1]):
        return Sighting(f"its norm is {logged[-1]}", math.inf)
    before = _before([value for value in known if value > 0])  # equal rewards give none
    if before is None or known[-1] <= max(_JUMP * before, _GRADIENT):
        return None
    return Sighting(f"its norm is {known[-1]:.3g}, and the median before was {before:.3g}", known[-1])


def _kl_jumps(history: History) -> Sighting | None:
    known = history.known("kl")
    level, before = _last(known, _DISTANCE_WINDOW), _before(known)
    if level is not None and level > _KL:
        return Sighting(f"it is {level:.3g} nats per token, over {_DISTANCE_WINDOW} logs", level)
    if before is not None and known[-1] > max(_JUMP * before, _KL_JUMP):
        return Sighting(f"it is {known[-1]:.3g} nats per token, and the median before was {before:.3g}", known[-1])
    return None


def _entropy_collapses(history: History) -> Sighting | None:
    entropy = _start_and_end(history.known("entropy"))
    equal, between = _last(history.known(*_EQUAL_METRICS)), _last(history.known("reward_std"))
    if entropy is None or equal is None or between is None or entropy[1] >= _ENTROPY_LOW * entropy[0]:
        return None
    rewards = [0.0, *history.known("reward")]
    # Of a task that is solved, the entropy is low too. Then the rewards of different prompts are equal as well.
    if equal < _ENTROPY_EQUAL or between < _BETWEEN * (max(rewards) - min(rewards)) or between == 0:
        return None
    seen = f"it fell from {entropy[0]:.3g} to {entropy[1]:.3g} nats per token, and in {equal:.0%} of the prompts all"
    return Sighting(f"{seen} completions have the same reward")


def _entropy_explodes(history: History) -> Sighting | None:
    entropy = _start_and_end(history.known("entropy"))
    if entropy is None or entropy[1] < max(_ENTROPY_HIGH * entropy[0], entropy[0] + _ENTROPY_RISE):
        return None
    return Sighting(f"it rose from {entropy[0]:.3g} to {entropy[1]:.3g} nats per token", entropy[1])


def _not_moving(history: History) -> Sighting | None:
    rates = history.known("learning_rate")
    if len(rates) >= WINDOW and not any(rates[-WINDOW:]):
        return Sighting(f"the learning rate was 0 in {WINDOW} logs one after the other")
    gradients = history.known("grad_norm", "loss")
    equal = _last(history.known(*_EQUAL_METRICS))
    if len(gradients) < WINDOW or any(gradients[-WINDOW:]) or (equal is not None and equal >= _EQUAL):
        return None
    return Sighting(f"the gradient was 0 in {WINDOW} logs one after the other, though rewards differ")


RULES: tuple[Rule, ...] = (
    Rule(
        "too-hard",
        "prompts are too hard, or the reward never matches",
        _EQUAL_METRICS,
        f"mean of {WINDOW} logs from {_EQUAL} on, with `reward` in the lower half of its range",
        f"below {_EQUAL:.0%} of the prompts",
        "the completions and what the reward function looks for in them, easier prompts or a worked example, "
        "`num_generations`, `dynamic_sampling_rounds`",
        _too_hard,
    ),
    Rule(
        "too-easy",
        "prompts are too easy",
        _EQUAL_METRICS,
        f"mean of {WINDOW} logs from {_EQUAL} on, with `reward` in the upper half of its range; of {_SOLVED} logs if "
        "the training has learned them",
        f"below {_EQUAL:.0%} of the prompts",
        "harder prompts, `dynamic_sampling_rounds`, or whether the training is done",
        _too_easy,
    ),
    Rule(
        "unscored",
        "completions get no reward",
        ("reward", "rewards/*/mean"),
        f"`reward` missing in 2 logs, or the mean of one function in {WINDOW}",
        "each function scores some completions",
        "the columns of the dataset that the function reads, and what it returns None for",
        _unscored,
    ),
    Rule(
        "held-out",
        "the reward rises and the held-out reward falls",
        ("eval_reward",),
        f"two evaluations lower than an earlier one by {_HELD_OUT} deviations of `eval_reward`, with `reward` higher "
        "than then",
        "both rise",
        "what the reward function can be fooled by, more prompts, `learning_rate`, `beta`, an earlier checkpoint",
        _held_out_falls,
    ),
    Rule(
        "cut",
        "completions are cut off",
        ("tree/finish_length_frac", "completions/clipped_ratio"),
        f"mean of {WINDOW} logs from {_CUT} on",
        f"below {_CUT:.0%} of the completions",
        "`max_completion_length`, `max_tree_tokens`, `stop_pattern`, and whether the prompt says how to end",
        _cut,
    ),
    Rule(
        "repetition",
        "completions repeat themselves",
        ("tree/finish_repetition_frac",),
        f"mean of {WINDOW} logs from {_REPEATED} on",
        f"below {_REPEATED:.0%} of the completions",
        "`temperature`, `learning_rate`, `beta`, and whether the reward pays for length",
        _repeated,
    ),
    Rule(
        "length",
        "completions grow without getting better",
        ("tree/mean_length", "completions/mean_length"),
        f"{_LONGER} times as long as at the start and {_ERRORS} standard errors longer, with "
        f"`tree/length_reward_correlation` from {_CORRELATION} on or no higher `reward`",
        "length and reward rise together, and of one prompt the longer completions are not the better ones",
        "whether the reward function pays for length, `loss_type`, `mask_truncated_completions`, TRL's "
        "`get_soft_overlong_punishment`",
        _longer,
    ),
    Rule(
        "no-sharing",
        "trees do not share",
        ("tree/leaf_unique_ratio",),
        f"mean of {WINDOW} logs below {_SHARED}",
        f"above {_SHARED}",
        "`segment_length` (about a tenth of a completion), `branch_schedule`, `branching_factor`",
        _not_shared,
    ),
    Rule(
        "engine",
        "the engine is far from the policy",
        ("engine/logp_difference_mean", "sampling/sampling_logp_difference/mean"),
        f"mean of {_DISTANCE_WINDOW} logs above {_DISTANCE} nats per token",
        f"below {_DISTANCE} nats; `top_p`, `top_k` and `min_p` add to it by design",
        "`vllm_lora_sync`, `vllm_base_weights`, and whether both have the same revision and dtype",
        _engine_is_far,
    ),
    Rule(
        "gradient",
        "the gradient jumps",
        ("grad_norm",),
        f"not finite, or above {_GRADIENT:g} and {_JUMP} times the median of the {_BEFORE} logs before",
        f"below {_GRADIENT:g}, or of the size of those before",
        "`learning_rate`, `max_grad_norm`, `warmup_steps`, and rewards of very different size",
        _gradient_jumps,
    ),
    Rule(
        "kl",
        "the policy leaves the reference model",
        ("kl",),
        f"mean of {_DISTANCE_WINDOW} logs above {_KL:g}, or a value above {_KL_JUMP} and {_JUMP} times the median of "
        f"the {_BEFORE} logs before",
        f"below {_KL:g} nat per token, without jumps",
        "`learning_rate`, `beta`, `max_grad_norm`",
        _kl_jumps,
    ),
    Rule(
        "entropy-low",
        "the entropy collapses",
        ("entropy",),
        f"below {_ENTROPY_LOW} of that at the start, with equal rewards in {_ENTROPY_EQUAL:.0%} of the prompts and "
        f"`reward_std` from {_BETWEEN} of the range of `reward` on",
        "it falls slowly, and completions of a prompt go on to differ",
        "`temperature`, `learning_rate`, `epsilon_high`, `entropy_coef`, `beta`",
        _entropy_collapses,
    ),
    Rule(
        "entropy-high",
        "the entropy explodes",
        ("entropy",),
        f"{_ENTROPY_HIGH:g} times that at the start, and {_ENTROPY_RISE:g} nat more",
        "it falls slowly or stays",
        "`learning_rate`, `entropy_coef`, `temperature`, `max_grad_norm`",
        _entropy_explodes,
    ),
    Rule(
        "not-moving",
        "the policy does not move",
        ("grad_norm", "learning_rate"),
        f"`grad_norm` or `learning_rate` 0 in {WINDOW} logs one after the other, with different rewards",
        "above 0",
        "`learning_rate`, `lr_scheduler_type`, `warmup_steps`, `reward_weights`, `lora_target_modules`",
        _not_moving,
    ),
)
