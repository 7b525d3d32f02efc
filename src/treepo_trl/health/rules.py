"""
The rules: which logged values are no longer usual, what that means and where to look. Standard library only.

`RULES` is the one table of them. docs/health.md is made from it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import signs
from .history import History
from .signs import Sighting


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


RULES: tuple[Rule, ...] = (
    Rule(
        "too-hard",
        "prompts are too hard, or the reward never matches",
        signs.EQUAL_METRICS,
        f"mean of {signs.WINDOW} logs and {signs.PROMPTS} prompts from {signs.EQUAL} on, with `reward` in the "
        "lower half of its range",
        f"below {signs.EQUAL:.0%} of the prompts",
        "the completions and what the reward function looks for in them, easier prompts or a worked example, "
        "`num_generations`, `prompt_selection`, `dynamic_sampling_rounds`",
        signs.too_hard,
    ),
    Rule(
        "too-easy",
        "prompts are too easy",
        signs.EQUAL_METRICS,
        f"mean of {signs.WINDOW} logs and {signs.PROMPTS} prompts from {signs.EQUAL} on, with `reward` in the "
        f"upper half of its range; of {signs.SOLVED} logs if the training has learned them",
        f"below {signs.EQUAL:.0%} of the prompts",
        "harder prompts, `prompt_selection`, `dynamic_sampling_rounds`, or whether the training is done",
        signs.too_easy,
    ),
    Rule(
        "all-or-nothing",
        "each prompt is either too easy or too hard",
        signs.EQUAL_METRICS,
        f"mean of {signs.WINDOW} logs and {signs.PROMPTS} prompts from {signs.ALL_EQUAL} on, with `reward_std` from "
        f"{signs.SPLIT} of the range of rewards on",
        f"below {signs.EQUAL:.0%} of the prompts",
        "prompts of middling difficulty, `prompt_selection`, `dynamic_sampling_rounds`, `temperature`, "
        "`num_generations`",
        signs.all_or_nothing,
    ),
    Rule(
        "unscored",
        "completions get no reward",
        ("reward", "rewards/*/mean"),
        f"`reward` missing in 2 logs, or the mean of one function in {signs.WINDOW}",
        "each function scores some completions",
        "the columns of the dataset that the function reads, and what it returns None for",
        signs.unscored,
    ),
    Rule(
        "cut",
        "completions are cut off",
        ("tree/finish_length_frac", "completions/clipped_ratio"),
        f"mean of {signs.WINDOW} logs from {signs.CUT} on",
        f"below {signs.CUT:.0%} of the completions",
        "`max_completion_length`, `max_tree_tokens`, `stop_pattern`, and whether the prompt says how to end",
        signs.cut,
    ),
    Rule(
        "repetition",
        "completions repeat themselves",
        ("tree/finish_repetition_frac",),
        f"mean of {signs.WINDOW} logs from {signs.REPEATED} on",
        f"below {signs.REPEATED:.0%} of the completions",
        "`temperature`, `learning_rate`, `beta`, and whether the reward pays for length",
        signs.repeated,
    ),
    Rule(
        "length",
        "completions grow without getting better",
        ("tree/mean_length", "completions/mean_length"),
        f"{signs.LONGER} times as long as at the start and {signs.ERRORS} standard errors longer, with "
        f"`tree/length_reward_correlation` from {signs.CORRELATION} on or no higher `reward`",
        "length and reward rise together, and of one prompt the longer completions are not the better ones",
        "whether the reward function pays for length, `loss_type`, `mask_truncated_completions`, TRL's "
        "`get_soft_overlong_punishment`",
        signs.longer,
    ),
    Rule(
        "no-sharing",
        "trees do not share",
        ("tree/leaf_unique_ratio",),
        f"mean of {signs.WINDOW} logs below {signs.SHARED}",
        f"above {signs.SHARED}",
        "`segment_length` (about a tenth of a completion), `branch_schedule`, `branching_factor`",
        signs.not_shared,
    ),
    Rule(
        "engine",
        "the engine is far from the policy",
        ("engine/logp_difference_mean", "sampling/sampling_logp_difference/mean"),
        f"mean of {signs.NEAR} logs above {signs.DISTANCE} nats per token",
        f"below {signs.DISTANCE} nats; `top_p`, `top_k` and `min_p` add to it by design",
        "`vllm_lora_sync`, `vllm_base_weights`, and whether both have the same revision and dtype",
        signs.engine_is_far,
    ),
    Rule(
        "not-finite",
        "the gradient is not finite",
        ("grad_norm",),
        f"`nan` or `inf` in {signs.NEAR} logs and {signs.NOT_FINITE} steps one after the other",
        "finite, but for the first steps of `fp16`, which finds its scale so",
        "`bf16` in place of `fp16`, `learning_rate`, `max_grad_norm`, and rewards that are not finite",
        signs.gradient_is_not_finite,
    ),
    Rule(
        "not-moving",
        "the policy does not move",
        ("grad_norm", "learning_rate"),
        f"`grad_norm` or `learning_rate` 0 in {signs.WINDOW} logs one after the other, with different rewards",
        "above 0",
        "`learning_rate`, `lr_scheduler_type`, `warmup_steps`, `reward_weights`, `lora_target_modules`",
        signs.not_moving,
    ),
)
