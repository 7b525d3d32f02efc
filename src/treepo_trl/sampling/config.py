"""`TreeSamplingConfig`: the shape of a tree and when its paths end, with every check that needs no engine."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from .branching import BranchingPolicy, BranchSchedule, FallbackCandidates, FallbackPolicy


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a `ValueError` unless `value` is one of the options of a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(f"`{name}` is {value!r}. Choose one of {', '.join(map(repr, get_args(choices)))}.")


def check_int(name: str, value: Any) -> None:
    """Raise a `TypeError` unless `value` is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be a whole number.")


@dataclass
class TreeSamplingConfig:
    # docstyle-ignore
    r"""
    How a [`TreeSampler`] grows a tree. [`TreePOConfig`] has the same fields, so either serves.

    Paper sections refer to [TreePO](https://huggingface.co/papers/2508.17445).

    Parameters:
        num_generations (`int`, *optional*, defaults to `8`):
            Leaves W of each tree.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest path in tokens, d*l.
        segment_length (`int`, *optional*):
            Tokens per segment (l). Default: a fourteenth of `max_completion_length`, rounded up, which is the paper's
            14 segments (14 x 512, section 4.2).
        branching_factor (`int`, *optional*, defaults to `2`):
            Children N per path of a full level (section 2.2). 1 samples `num_generations` independent completions,
            unless `initial_branching_factor` says otherwise.
        initial_branching_factor (`int` or `[low, high]`, *optional*):
            Children of the prompt; two numbers draw one for each prompt, uniformly (the paper's best setting is
            `[2, 8]`). Default: `branching_factor`, or `num_generations` when that is 1.
        branching_policy (`str`, *optional*, defaults to `"uniform"`):
            Who gets the branches beyond one each: `"uniform"` splits evenly; `"low_prob"` and `"high_prob"` by the
            mean log-probability of the last segment's tokens (section 4.4, where `"uniform"` was best); `"entropy"` by
            the mean entropy of the distributions that they were drawn from.
        branching_temperature (`float`, *optional*, defaults to `2.0`):
            Softmax temperature of all policies but `"uniform"`, in nats (section 4.4).
        branching_temperature_end (`float`, *optional*):
            Temperature at the end of training, reached along half a cosine (section 4.4 goes from 5 to 1). Without
            training nothing changes. Default: the temperature stays.
        branch_schedule (`str`, *optional*, defaults to `"early"`):
            `"early"` branches as soon as it can (the paper); `"spread"` opens the branches evenly over the expected
            length, which shares more tokens.
        expected_completion_length (`int`, *optional*):
            Length in tokens over which `"spread"` opens the branches. Default: what the caller of the sampler expects
            (the trainer passes the last batch's mean length), else `max_completion_length`.
        fallback_policy (`str`, *optional*, defaults to `"random"`):
            Where a tree without live paths and with too few leaves grows again: at a `"random"` segment boundary of a
            finished path (the paper), in front of its least likely segment (`"low_prob"`), at the `"root"`, or nowhere
            (`"none"`: then trees may have fewer leaves).
        fallback_candidates (`str`, *optional*, defaults to `"finished"`):
            Which paths a fallback may cut: `"finished"` takes those that ended by EOS or by the stop pattern, and
            grows from the prompt when there is none (the paper); `"finished_first"` takes any other path then;
            `"all"` makes no difference between them.
        max_tree_tokens (`int`, *optional*):
            Most tokens to decode for a tree, at least `max_completion_length`. A tree opens no more paths than it can
            be expected to finish within it, so it may have fewer than `num_generations` leaves.
        stop_pattern (`str`, *optional*):
            Regular expression that ends a path once it matches the path's text, e.g. `r"\\boxed\{[^}]*\}"`.
        stop_repetition (`bool`, *optional*, defaults to `True`):
            Whether a path that has run into a loop of text ends there.

    Raises:
        ValueError: saying what was set, what is allowed and what to change. `TypeError` for numbers that are none.
    """

    num_generations: int = field(default=8, metadata={"help": "Leaves of each tree."})
    max_completion_length: int = field(default=512, metadata={"help": "Longest path in tokens."})
    segment_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per segment. Default: max_completion_length / 14, rounded up."},
    )
    branching_factor: int = field(
        default=2,
        metadata={"help": "Children per path of a full level. 1 samples independent completions."},
    )
    initial_branching_factor: list[int] | None = field(
        default=None,
        metadata={
            "help": "Children of the prompt: one number, or two to draw from uniformly for each prompt. Default: "
            "branching_factor, or num_generations when that is 1."
        },
    )
    branching_policy: BranchingPolicy = field(
        default="uniform",
        metadata={"help": "Who gets the branches beyond one each: evenly, by low or high probability, or by entropy."},
    )
    branching_temperature: float = field(
        default=2.0,
        metadata={"help": "Softmax temperature of the branching policies low_prob, high_prob and entropy."},
    )
    branching_temperature_end: float | None = field(
        default=None,
        metadata={"help": "Branching temperature at the end of training, along half a cosine. Default: no change."},
    )
    branch_schedule: BranchSchedule = field(
        default="early",
        metadata={"help": "Branch as soon as possible, or spread the branches evenly over the expected length."},
    )
    expected_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens over which `spread` opens the branches. Default: the last batch's mean in training, else "
            "max_completion_length."
        },
    )
    fallback_policy: FallbackPolicy = field(
        default="random",
        metadata={"help": "Where a tree without live paths grows the leaves that are missing."},
    )
    fallback_candidates: FallbackCandidates = field(
        default="finished",
        metadata={"help": "Which paths a fallback may cut: finished ones, those first, or all."},
    )
    max_tree_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens to decode for a tree, which may then have fewer leaves. Not for training."},
    )
    stop_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression that ends a path once it matches the path's text."},
    )
    stop_repetition: bool = field(
        default=True,
        metadata={"help": "Whether a path that has run into a loop of text ends there."},
    )

    @property
    def max_tree_depth(self) -> int:
        """Segments on the longest path: `ceil(max_completion_length / segment_length)`."""
        assert self.segment_length is not None, "set in __post_init__"
        return math.ceil(self.max_completion_length / self.segment_length)

    def __post_init__(self) -> None:
        self._check_tree_shape()
        self._check_initial_branching()
        check_choice("branching_policy", self.branching_policy, BranchingPolicy)
        check_choice("branch_schedule", self.branch_schedule, BranchSchedule)
        check_choice("fallback_policy", self.fallback_policy, FallbackPolicy)
        check_choice("fallback_candidates", self.fallback_candidates, FallbackCandidates)
        self._check_temperatures()
        self._check_lengths()
        self._check_stop_pattern()

    def _check_tree_shape(self) -> None:
        check_int("num_generations", self.num_generations)
        check_int("max_completion_length", self.max_completion_length)
        check_int("branching_factor", self.branching_factor)
        if self.num_generations < 1:
            raise ValueError(f"`num_generations` is {self.num_generations}; a tree has at least 1 leaf.")
        if self.max_completion_length < 1:
            raise ValueError(f"`max_completion_length` is {self.max_completion_length}; it must be at least 1 token.")
        if self.segment_length is None:
            self.segment_length = math.ceil(self.max_completion_length / 14)
        check_int("segment_length", self.segment_length)
        if not 1 <= self.segment_length <= self.max_completion_length:
            raise ValueError(
                f"`segment_length` is {self.segment_length}; it must be between 1 and `max_completion_length` "
                f"({self.max_completion_length}). Leave it out for the default of a fourteenth of that."
            )
        if not 1 <= self.branching_factor <= max(self.num_generations, 2):  # the default serves a width of 1 too
            raise ValueError(
                f"`branching_factor` is {self.branching_factor}; it must be between 1 (no branching) and "
                f"`num_generations` ({self.num_generations}), the number of completions of a tree. Lower the one or "
                "raise the other."
            )

    def _check_initial_branching(self) -> None:
        if self.initial_branching_factor is None:
            first = self.num_generations if self.branching_factor == 1 else self.branching_factor
            self.initial_branching_factor = [min(first, self.num_generations)]
        value: Any = self.initial_branching_factor
        bounds = list(cast(list[Any], value)) if isinstance(value, list | tuple) else [value]
        for bound in bounds:
            check_int("initial_branching_factor", bound)
        low, high = (bounds[0], bounds[-1]) if bounds else (0, 0)
        if len(bounds) not in (1, 2) or not 1 <= low <= high:
            raise ValueError(
                f"`initial_branching_factor` is {value}. Give one number of at least 1, or `[low, high]` with "
                "1 <= low <= high."
            )
        if high > self.num_generations:
            raise ValueError(
                f"`initial_branching_factor` is {value}, more than the `num_generations` ({self.num_generations}) "
                "completions of a tree. Lower the one or raise the other."
            )
        self.initial_branching_factor = [low, high]

    def _check_temperatures(self) -> None:
        for name in ("branching_temperature", "branching_temperature_end"):
            value: float | None = getattr(self, name)
            if value is None and name == "branching_temperature_end":
                continue
            if value is None or not value > 0:
                raise ValueError(
                    f"`{name}` is {value}; it must be positive. A large value splits the branches evenly."
                )

    def _check_lengths(self) -> None:
        expected, budget = self.expected_completion_length, self.max_tree_tokens
        if expected is not None:
            check_int("expected_completion_length", expected)
            if not 1 <= expected <= self.max_completion_length:
                raise ValueError(
                    f"`expected_completion_length` is {expected}; it must be between 1 and `max_completion_length` "
                    f"({self.max_completion_length}). Leave it out if you do not know it."
                )
        if budget is not None:
            check_int("max_tree_tokens", budget)
            if budget < self.max_completion_length:
                raise ValueError(
                    f"`max_tree_tokens` is {budget}, less than one path of `max_completion_length` "
                    f"({self.max_completion_length}) tokens. Raise the one or lower the other."
                )

    def _check_stop_pattern(self) -> None:
        pattern: Any = self.stop_pattern
        if pattern is None:
            return
        if not isinstance(pattern, str):
            raise TypeError(f"`stop_pattern` is {pattern!r}; give a regular expression as text.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`stop_pattern` is {pattern!r}, which is no regular expression: {error}. Give a Python "
                r"pattern such as '\\boxed\{[^}]*\}'."
            ) from error
        if re.search(pattern, "") is not None:
            raise ValueError(
                f"`stop_pattern` is {pattern!r}, which matches the empty text, so every path would end at "
                "its first token. Make it match at least one character."
            )
