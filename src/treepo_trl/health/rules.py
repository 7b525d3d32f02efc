"""
The rules: which logged values are no longer usual, what that means and where to look. Standard library only.

`RULES` is the one table of them, and docs/health.md is made from it. A check looks at the end of a history and says
what it saw, or `None`. It never raises, whatever was logged.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance


_WINDOW = 5
"""Logs over which a lasting state is averaged, at the end of the training and at its start."""
_PROMPTS = 40
"""Prompts over which a fraction of prompts is averaged, at least. Of a single prompt, each log says 0 or 1."""
_LARGEST = 1e100
"""Values beyond are no measurements, and their sums would overflow."""
_EQUAL, _CUT, _REPEATED = 0.9, 0.3, 0.2  # fractions
_SHARED = 1.1  # leaf tokens per unique token
_DISTANCE, _NEAR = 0.1, 3  # nats per token, logs
_NOT_FINITE = 20  # steps: by design fp16 skips one per halving of its scale, and 16 lead from 65536 to 1
_LONGER, _ERRORS = 1.5, 3  # times the length at the start; standard errors
_CORRELATION = 0.5
_GAIN = 0.1  # deviations of the reward

_EQUAL_METRICS = ("tree/equal_rewards_frac", "frac_reward_zero_std")
_CUT_METRICS = ("tree/finish_length_frac", "completions/clipped_ratio")
_LENGTH_METRICS = ("tree/mean_length", "completions/mean_length")
_ENGINE_METRICS = ("engine/logp_difference_mean", "sampling/sampling_logp_difference/mean")


class History:
    """
    Values of each metric in the order in which they were logged.

    Attributes:
        step (`int`):
            Global step of the last log.
    """

    def __init__(self) -> None:
        self.step = 0
        self._logged: dict[str, list[float | None]] = {}
        self._known: dict[str, list[float]] = {}
        self._known_at: dict[str, int] = {}

    def add(self, log: Mapping[str, object]) -> None:
        """Add a log as `Trainer.log` keeps it: metrics and the global step. What is no number is left out."""
        step = _number(log.get("step"))
        if step is not None and math.isfinite(step):
            self.step = int(step)
        for name, value in log.items():
            number = _number(value)
            if number is None and value is not None:
                continue
            self._logged.setdefault(name, []).append(number)
            if number is not None and abs(number) <= _LARGEST:
                self._known.setdefault(name, []).append(number)
                self._known_at[name] = self.step

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Metrics that were logged, in the order of their first log."""
        return [name for name in self._logged if name.startswith(prefix) and name.endswith(suffix)]

    def logged(self, name: str) -> list[float | None]:
        """All values of a metric. TRL logs `None` where a batch had no value."""
        return self._logged.get(name, [])

    def known(self, *names: str) -> list[float]:
        """Values of the first of these metrics that has any, without missing, infinite and absurd ones."""
        return next((self._known[name] for name in names if name in self._known), [])

    def steps_without(self, name: str) -> int:
        """Steps since a value of the metric was known."""
        return self.step - self._known_at.get(name, 0)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None


# Rewards


def _equal_rewards(history: History) -> str | None:
    prompts_per_log = max([1.0, *history.known("tree/prompts")[-1:]])
    count = max(_WINDOW, math.ceil(_PROMPTS / prompts_per_log))
    equal, reward = _last(history.known(*_EQUAL_METRICS), count), _last(history.known("reward"), count)
    if equal is None or reward is None or equal < _EQUAL:
        return None
    seen = f"in {equal:.0%} of the prompts all completions had the same reward, over {count} logs"
    return f"{seen}, at a mean reward of {reward:.3g}"


def _last(values: Sequence[float], count: int = _WINDOW) -> float | None:
    """Mean of the last values, `None` if there are not as many."""
    return fmean(values[-count:]) if len(values) >= count else None


def _unscored(history: History) -> str | None:
    if _are_missing(history.logged("reward"), 2):
        return "no reward function scored any completion, in 2 logs one after the other"
    names = history.names("rewards/", "/mean")
    silent = [
        name.removeprefix("rewards/").removesuffix("/mean")
        for name in names
        if _are_missing(history.logged(name), _WINDOW)
    ]
    return f"{', '.join(silent)} returned None for every completion of {_WINDOW} logs" if silent else None


def _are_missing(values: Sequence[float | None], count: int) -> bool:
    last = values[-count:]
    return len(last) == count and all(value is None or math.isnan(value) for value in last)


# Completions


def _cut(history: History) -> str | None:
    cut = _last(history.known(*_CUT_METRICS))
    if cut is None or cut < _CUT:
        return None
    return f"{cut:.0%} of the completions were cut at the cap on their length, over {_WINDOW} logs"


def _repeated(history: History) -> str | None:
    repeated = _last(history.known("tree/finish_repetition_frac"))
    if repeated is None or repeated < _REPEATED:
        return None
    return f"{repeated:.0%} of the completions ended in a repetition, over {_WINDOW} logs"


def _longer(history: History) -> str | None:
    lengths, rewards = history.known(*_LENGTH_METRICS), history.known("reward")
    if min(len(lengths), len(rewards)) < 2 * _WINDOW:
        return None
    start, end = lengths[:_WINDOW], lengths[-_WINDOW:]
    first, last = fmean(start), fmean(end)
    error = math.sqrt((variance(start) + variance(end)) / _WINDOW)
    if last < _LONGER * first or last - first <= _ERRORS * error:
        return None
    seen = f"their mean length rose from {first:.0f} to {last:.0f} tokens"
    correlation = _last(history.known("tree/length_reward_correlation"))
    if correlation is not None and correlation >= _CORRELATION:
        return f"{seen}, and the longer ones of a prompt get more reward (correlation {correlation:.2f})"
    before, after = fmean(rewards[:_WINDOW]), fmean(rewards[-_WINDOW:])
    if after - before > _GAIN * (_last(history.known("reward_std")) or 0.0):
        return None
    return f"{seen}, and the reward went from {before:.3g} to {after:.3g}"


def _not_shared(history: History) -> str | None:
    ratio = _last(history.known("tree/leaf_unique_ratio"))
    if ratio is None or ratio >= _SHARED:
        return None
    return f"a sampled token is in {ratio:.2f} completions on average, over {_WINDOW} logs"


# The update


def _engine_is_far(history: History) -> str | None:
    distance = _last(history.known(*_ENGINE_METRICS), _NEAR)
    if distance is None or distance <= _DISTANCE:
        return None
    return f"its log-probabilities differ by {distance:.3f} nats per token, over {_NEAR} logs"


def _gradient_is_not_finite(history: History) -> str | None:
    last, steps = history.logged("grad_norm")[-_NEAR:], history.steps_without("grad_norm")
    if len(last) < _NEAR or steps < _NOT_FINITE or any(value is None or math.isfinite(value) for value in last):
        return None
    return f"its norm is {last[-1]}, and none was finite in {steps} steps"


def _not_moving(history: History) -> str | None:
    rates, gradients = history.known("learning_rate"), history.known("grad_norm", "loss")
    if len(rates) >= _WINDOW and not any(rates[-_WINDOW:]):
        return f"the learning rate was 0 in {_WINDOW} logs one after the other"
    equal = _last(history.known(*_EQUAL_METRICS))
    if len(gradients) < _WINDOW or any(gradients[-_WINDOW:]) or (equal is not None and equal >= _EQUAL):
        return None
    return f"the gradient was 0 in {_WINDOW} logs one after the other, though rewards differ"


# The table


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
    check: Callable[[History], str | None]
    """What the end of a history shows of it, in words with numbers."""


RULES: tuple[Rule, ...] = (
    Rule(
        "equal-rewards",
        "most prompts teach nothing",
        _EQUAL_METRICS,
        f"mean of {_WINDOW} logs and {_PROMPTS} prompts from {_EQUAL} on",
        f"below {_EQUAL:.0%} of the prompts",
        "the mean reward. If it is low: the completions and what the reward function looks for in them, easier "
        "prompts or a worked example. If it is high: harder prompts, or whether the training is done. If it is "
        "neither: prompts of middling difficulty. Always: `prompt_selection`, `dynamic_sampling_rounds`, "
        "`num_generations`, `temperature`",
        _equal_rewards,
    ),
    Rule(
        "unscored",
        "completions get no reward",
        ("reward", "rewards/*/mean"),
        f"`reward` missing in 2 logs, or the mean of one function in {_WINDOW}",
        "each function scores some completions",
        "the columns of the dataset that the function reads, and what it returns None for",
        _unscored,
    ),
    Rule(
        "cut",
        "completions are cut off",
        _CUT_METRICS,
        f"mean of {_WINDOW} logs from {_CUT} on",
        f"below {_CUT:.0%} of the completions",
        "`max_completion_length`, `max_tree_tokens`, `stop_pattern`, and whether the prompt says how to end",
        _cut,
    ),
    Rule(
        "repetition",
        "completions repeat themselves",
        ("tree/finish_repetition_frac",),
        f"mean of {_WINDOW} logs from {_REPEATED} on",
        f"below {_REPEATED:.0%} of the completions",
        "`temperature`, `learning_rate`, `beta`, and whether the reward pays for length",
        _repeated,
    ),
    Rule(
        "length",
        "completions grow without getting better",
        _LENGTH_METRICS,
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
        f"mean of {_WINDOW} logs below {_SHARED}",
        f"above {_SHARED}",
        "`segment_length` (about a tenth of a completion), `branch_schedule`, `branching_factor`",
        _not_shared,
    ),
    Rule(
        "engine",
        "the engine is far from the policy",
        _ENGINE_METRICS,
        f"mean of {_NEAR} logs above {_DISTANCE} nats per token",
        f"below {_DISTANCE} nats; `top_p`, `top_k` and `min_p` add to it by design",
        "`vllm_lora_sync`, `vllm_base_weights`, and whether both have the same revision and dtype",
        _engine_is_far,
    ),
    Rule(
        "not-finite",
        "the gradient is not finite",
        ("grad_norm",),
        f"`nan` or `inf` in {_NEAR} logs and {_NOT_FINITE} steps one after the other",
        "finite, but for the first steps of `fp16`, which finds its scale so",
        "`bf16` in place of `fp16`, `learning_rate`, `max_grad_norm`, and rewards that are not finite",
        _gradient_is_not_finite,
    ),
    Rule(
        "not-moving",
        "the policy does not move",
        ("grad_norm", "learning_rate"),
        f"`grad_norm` or `learning_rate` 0 in {_WINDOW} logs one after the other, with different rewards",
        "above 0",
        "`learning_rate`, `lr_scheduler_type`, `warmup_steps`, `reward_weights`, `lora_target_modules`",
        _not_moving,
    ),
)
