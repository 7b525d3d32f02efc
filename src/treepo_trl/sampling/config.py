"""`TreeSamplingConfig`: the shape of a tree and when its paths end, with every check that needs no engine."""

import re
import warnings
from dataclasses import dataclass, field
from typing import cast

from treepo_trl.settings import OF_TREES, Ranges, check_exclusions, check_fields, check_int, check_ranges

from .branching import SCHEDULES, BranchingPolicy, BranchSchedule, FallbackCandidates, FallbackPolicy, Widths
from .stopping import MIN_REPEATED_CHARACTERS, MIN_REPEATS


_RANGES: Ranges = {
    "num_generations": (lambda value: value >= 1, "at least 1, the leaves of a tree"),
    "max_completion_length": (lambda value: value >= 1, "at least 1 token"),
    "branching_temperature": (lambda value: value > 0, "above 0; a large value splits the branches evenly"),
    "branching_temperature_end": (lambda value: value > 0, "above 0; a large value splits the branches evenly"),
}


@dataclass
class TreeSamplingConfig:
    r"""
    How a [`TreeSampler`] grows a tree: its segments, where it branches and falls back, when its paths end.

    [`TreePOConfig`] has the same fields, so either serves. Each field's `help` describes it, and docs/settings.md
    prints them all.

    Raises:
        ValueError: saying what was set, what is allowed and what to change. `TypeError` for numbers that are none.

    Example:

    ```python
    >>> from treepo_trl import TreeSamplingConfig
    >>> config = TreeSamplingConfig(num_generations=16, max_completion_length=7168)
    >>> config.segment_length, config.max_tree_depth
    (512, 14)
    >>> TreeSamplingConfig(branching_factor=9)
    Traceback (most recent call last):
        ...
    ValueError: `branching_factor` is 9; it must be between 1 (no branching) and `num_generations` (8), ...

    ```
    """

    num_generations: int = field(
        default=8,
        metadata={
            "help": "Width of the tree: leaves, and so completions, per prompt. From 1 on, training needs 2. Paper: "
            "16. More leaves cost less than with independent sampling, because they share prefixes. In training "
            "`per_device_train_batch_size * steps_per_generation` must be a multiple of it, so that no tree is split "
            "over processes."
        },
    )
    max_completion_length: int = field(
        default=512,
        metadata={
            "help": "Longest path in tokens, from 1 on, without the prompt. A path that reaches it is cut off there. "
            "Paper: 7168. A prompt that leaves less room in the engine's context shortens its own paths; one that "
            "leaves none is an error."
        },
    )
    segment_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per segment, from 1 to `max_completion_length`. A tree branches only between segments. "
            "Default: a fourteenth of `max_completion_length`, rounded up, which is the paper's 14 segments. Paper: "
            "512. Set a tenth of a typical completion if completions are much shorter than `max_completion_length`. "
            "vLLM ends a segment up to one cache block early (16 tokens on a GPU). So a child computes one token "
            "again and not most of a block."
        },
    )
    branching_factor: int = field(
        default=2,
        metadata={
            "help": "Children per path of a full level, from 1 to `num_generations`. Paper: 2. A larger number "
            "reaches the width earlier and shares less. 1 samples independent completions, unless "
            "`initial_branching_factor` is set. `sqrt` has its own widths, so more than 2 needs another "
            "`branch_schedule`."
        },
    )
    initial_branching_factor: list[int] | None = field(
        default=None,
        metadata={
            "help": "Children of the prompt: one number from 1 to `num_generations`, or two, low and high, between "
            "which each prompt draws uniformly. Default: `branching_factor`, or `num_generations` when that is 1. "
            "Paper: 2, and 2 to 8 in its best run. Raise it if first segments look alike. `sqrt` has its own widths "
            "and refuses it."
        },
    )
    branching_policy: BranchingPolicy = field(
        default="uniform",
        metadata={
            "help": "Which paths get more than one child. `uniform` goes by the weights of the paths alone: "
            "equal ones split evenly, as in the paper, and the heaviest goes first. `low_prob` and `high_prob` "
            "prefer paths whose last segment has a low or a high mean log-probability per token. `entropy` "
            "prefers paths whose last segment was drawn from distributions of high mean entropy. All but "
            "`uniform` are experiments: the paper found no gain in the probabilities and did not try the "
            "entropy."
        },
    )
    branching_temperature: float = field(
        default=2.0,
        metadata={
            "help": "Softmax temperature of the scores of `branching_policy`, in nats, above 0. `uniform` has no "
            "scores and ignores it. Paper: 2. Lower it if the scores of paths differ by much less: the split is then "
            "nearly even."
        },
    )
    branching_temperature_end: float | None = field(
        default=None,
        metadata={
            "help": "Value of `branching_temperature` at the end of training, in nats, above 0, reached along half a "
            "cosine. Default: the temperature stays. Paper: from 5 to 1 in one study. Without training it changes "
            "nothing."
        },
    )
    branch_schedule: BranchSchedule = field(
        default="early",
        metadata={
            "help": "When a tree branches. Default: `sqrt` in training, `early` for sampling alone. `sqrt` opens "
            "paths with the square root of the depth. That has the least noise per decoded token while nothing is "
            "known about the task. It takes lengths from the last batches, and of `branching_factor` only whether it "
            "is above 1. `early` branches as soon as it can, as the paper does. `spread` opens the branches evenly "
            "over the expected length. These two share more tokens, and their gradients lose more signal than that "
            "saves. Set `spread` if rollouts cost too much and completions have similar lengths."
        },
    )
    expected_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a completion, from 1 to `max_completion_length`, over which `spread` opens the "
            "branches and, in the first batch, `sqrt`. Default: the last batch's mean length in training, "
            "otherwise `max_completion_length`. Set it where lengths are known, so that the first trees end with "
            "few fallbacks. With `spread` a larger number shares more and favours long completions."
        },
    )
    fallback_policy: FallbackPolicy = field(
        default="root",
        metadata={
            "help": "Where a tree grows again when no path is live and leaves are missing. Default: `none` in "
            "training, `root` for sampling alone. `none`: nowhere, so a tree may have fewer leaves, and nothing is "
            "decoded behind the longest path. `root`: at the prompt, which keeps the gradient's direction exact. "
            "`random`: at a random segment boundary of a finished path, as in the paper. `low_prob`: in front of that "
            "path's least likely segment. Set one of these where `num_generations` completions are needed whatever "
            "they cost: a late one is decoded when the others are done."
        },
    )
    fallback_candidates: FallbackCandidates = field(
        default="finished",
        metadata={
            "help": "Which paths a fallback may cut; `root` and `none` cut none. `finished`: those that ended by EOS "
            "or `stop_pattern`; if there is none, the tree grows from the prompt, as in the paper. `finished_first`: "
            "those, and any other path only if there is none. `all`: every path. Set `finished_first` with "
            "`fallback_policy='random'` if most paths end at `max_completion_length`."
        },
    )
    max_tree_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens to decode for a tree, at least `max_completion_length`. Default: no limit. A tree "
            "opens only the paths that it can expect to finish, so it may have fewer than `num_generations` leaves. "
            "Training refuses it: it is for sampling alone."
        },
    )
    stop_pattern: str | None = field(
        default=None,
        metadata={
            "help": r"Python regular expression that ends a path once it matches the path's text, for example "
            r"`\\boxed\{[^}]*\}`. Default: none. Paper: a boxed answer. Set it if the reward reads nothing behind the "
            "answer. A match may span segments, and tokens behind it are dropped. Special tokens are not part of the "
            "text. `$` is the end of a segment. A pattern that matches the empty text is refused. A search "
            "of more than two seconds is an error, since some patterns would never end. Not with "
            "`mask_truncated_completions`: these paths have no EOS token and would be masked."
        },
    )
    stop_repetition: bool = field(
        default=True,
        metadata={
            "help": f"Whether a path ends once its text runs into a loop. Then its last {MIN_REPEATED_CHARACTERS} "
            f"characters or more repeat one unit at least {MIN_REPEATS} times. Paper: 32 characters, 8 times. Turn it "
            "off if text is legitimately periodic. `mask_truncated_completions` masks such a path, which has no EOS."
        },
    )

    @property
    def max_tree_depth(self) -> int:
        """Segments on the longest path: `ceil(max_completion_length / segment_length)`."""
        assert self.segment_length is not None, "set in __post_init__"
        return -(-self.max_completion_length // self.segment_length)

    @property
    def own_widths(self) -> Widths | None:
        """Widths that the schedule sets itself; `None` where they follow from `branching_factor`."""
        return None if self.branching_factor == 1 else SCHEDULES[self.branch_schedule].widths

    @property
    def first_width(self) -> list[int]:
        """Lowest and highest number of children of the prompt, where the schedule has no widths of its own."""
        if self.initial_branching_factor is not None:
            return self.initial_branching_factor
        first = self.num_generations if self.branching_factor == 1 else self.branching_factor
        return [min(first, self.num_generations)] * 2

    def __post_init__(self) -> None:
        check_fields(self, TreeSamplingConfig, _RANGES)
        if self.segment_length is None:
            self.segment_length = -(-self.max_completion_length // 14)
        check_ranges(self, self._ranges_by_tree())
        self._check_initial_branching()
        check_exclusions(self, OF_TREES)
        self._check_stop_pattern()

    def _ranges_by_tree(self) -> Ranges:
        """Ranges that end at the length or the width of the tree."""
        longest, width = self.max_completion_length, self.num_generations
        return {
            "segment_length": (
                lambda value: 1 <= value <= longest,
                f"between 1 and `max_completion_length` ({longest}). Leave it out for the default of a fourteenth of "
                "that",
            ),
            "branching_factor": (
                lambda value: 1 <= value <= max(width, 2),  # the default serves a width of 1 too
                f"between 1 (no branching) and `num_generations` ({width}), the number of completions of a tree. "
                "Lower the one or raise the other",
            ),
            "expected_completion_length": (
                lambda value: 1 <= value <= longest,
                f"between 1 and `max_completion_length` ({longest}). Leave it out if you do not know it",
            ),
            "max_tree_tokens": (
                lambda value: value >= longest,
                f"at least one path of `max_completion_length` ({longest}) tokens. Raise the one or lower the other",
            ),
        }

    def _check_initial_branching(self) -> None:
        if self.initial_branching_factor is None:
            return
        value = cast("object", self.initial_branching_factor)  # one number, a list or a tuple
        given = list(cast("list[object]", value)) if isinstance(value, list | tuple) else [value]
        bounds = [check_int("initial_branching_factor", bound) for bound in given]
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

    def _check_stop_pattern(self) -> None:
        pattern = self.stop_pattern
        if pattern is None:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # `[[a]b]` is no set of sets yet, or no longer
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise ValueError(
                f"`stop_pattern` is {pattern!r}, which is no regular expression: {error}. Give a Python "
                r"pattern such as '\\boxed\{[^}]*\}'."
            ) from error
        if re.search(pattern, "") is not None:
            raise ValueError(
                f"`stop_pattern` is {pattern!r}, which matches the empty text, so every path would end at "
                "its first token. Make it match at least one character."
            )
