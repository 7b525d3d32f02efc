"""`TreePOConfig`: what TreePO adds to [`~trl.GRPOConfig`], with every check that needs no model."""

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from trl.trainer.grpo_config import GRPOConfig

from .advantages import AdvantageEstimator
from .branching import BranchingPolicy, BranchSchedule, FallbackPolicy
from .packing import TreePacking


LeafWeighting = Literal["uniform", "inverse_branching"]
LoraSync = Literal["adapter", "merge"]


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"`{name}` is {value!r}. Choose one of {', '.join(map(repr, get_args(choices)))}.")


def _check_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be a whole number.")


@dataclass
class TreePOConfig(GRPOConfig):
    # docstyle-ignore
    r"""
    Configuration of the [`TreePOTrainer`].

    Extends [`~trl.GRPOConfig`]; `num_generations` is the tree width W and `max_completion_length` the cap d*l on a
    path's tokens. Paper sections refer to [TreePO](https://huggingface.co/papers/2508.17445).

    Parameters:
        > Parameters that control the tree

        segment_length (`int`, *optional*):
            Tokens per segment (l). Default: a fourteenth of `max_completion_length`, rounded up, which is the paper's
            14 segments (14 x 512, section 4.2).
        branching_factor (`int`, *optional*, defaults to `2`):
            Children N per path of a full level (section 2.2). 1 samples `num_generations` independent completions.
        initial_branching_factor (`int` or `[low, high]`, *optional*):
            Children of the prompt; two numbers draw one for each prompt, uniformly (the paper's best setting is
            `[2, 8]`). Default: `branching_factor`, or `num_generations` when that is 1.
        branching_policy (`str`, *optional*, defaults to `"uniform"`):
            Who gets the branches beyond one each: `"uniform"` splits evenly, `"low_prob"` and `"high_prob"` by the
            mean log-probability of the last segment (section 4.4, where `"uniform"` was best).
        branching_temperature (`float`, *optional*, defaults to `2.0`):
            Softmax temperature of `"low_prob"` and `"high_prob"` (section 4.4).
        branch_schedule (`str`, *optional*, defaults to `"early"`):
            `"early"` branches as soon as it can (the paper); `"spread"` opens the branches evenly over
            `max_completion_length`, which shares more tokens.
        fallback_policy (`str`, *optional*, defaults to `"random"`):
            Where a tree without live paths and with too few leaves grows again: at a `"random"` segment boundary of a
            finished path (the paper), in front of its least likely segment (`"low_prob"`), at the `"root"`, or nowhere
            (`"none"`, for offline sampling only).
        stop_pattern (`str`, *optional*):
            Regular expression that ends a path once it matches the path's text, e.g. `r"\\boxed\{[^}]*\}"`.
        stop_repetition (`bool`, *optional*, defaults to `True`):
            Whether a path that has run into a loop of text ends there.

        > Parameters that control the update

        advantage_estimator (`str`, *optional*, defaults to `"treepo"`):
            `"treepo"` (Eq. 5), `"treepo_size_weighted"` (Eq. 6), or `"grpo"` (the query group alone).
        subgroup_rejection (`bool`, *optional*, defaults to `False`):
            Leave out subgroups whose rewards are all equal (Eq. 7).
        leaf_weighting (`str`, *optional*, defaults to `"uniform"`):
            `"inverse_branching"` weights each leaf by the product of 1/children along its path, in the group means and
            in its advantages, which undoes the tilt that branching puts on the leaf distribution. Not with a KL term
            (`beta`), which would stay unweighted.
        tree_packing (`str`, *optional*, defaults to `"auto"`):
            Whether rows that share prefixes are forwarded once per unique token: `"sdpa"` always, `"off"` never,
            `"auto"` where it pays.

        > Parameters that control the engine and the logs

        vllm_lora_sync (`str`, *optional*, defaults to `"adapter"`):
            How a LoRA policy reaches vLLM: `"adapter"` loads only the adapter into the engine, `"merge"` is TRL's way
            (merge into the base model and push every weight).
        log_trees (`bool`, *optional*, defaults to `False`):
            Whether to write every sampled tree to `output_dir/trees`, one JSON line per tree.
    """

    if TYPE_CHECKING:  # optional in GRPOConfig, but always set after its own __post_init__
        num_generations: int = 8
        max_completion_length: int = 512
        steps_per_generation: int = 1

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
        metadata={
            "help": "Who gets the branches beyond one each: evenly, or by low or high probability.",
        },
    )
    branching_temperature: float = field(
        default=2.0,
        metadata={"help": "Softmax temperature of the branching policies low_prob and high_prob."},
    )
    branch_schedule: BranchSchedule = field(
        default="early",
        metadata={
            "help": "Branch as soon as possible, or spread the branches evenly over max_completion_length.",
        },
    )
    fallback_policy: FallbackPolicy = field(
        default="random",
        metadata={
            "help": "Where a tree without live paths grows the leaves that are missing.",
        },
    )
    stop_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression that ends a path once it matches the path's text."},
    )
    stop_repetition: bool = field(
        default=True,
        metadata={"help": "Whether a path that has run into a loop of text ends there."},
    )
    advantage_estimator: AdvantageEstimator = field(
        default="treepo",
        metadata={
            "help": "Advantage of each segment: treepo (Eq. 5), treepo_size_weighted (Eq. 6), or grpo.",
        },
    )
    subgroup_rejection: bool = field(
        default=False,
        metadata={"help": "Leave out subgroups whose rewards are all equal (Eq. 7)."},
    )
    leaf_weighting: LeafWeighting = field(
        default="uniform",
        metadata={
            "help": "Weight of each leaf in the group means and in its advantages.",
        },
    )
    tree_packing: TreePacking = field(
        default="auto",
        metadata={
            "help": "Whether rows that share prefixes are forwarded once per unique token.",
        },
    )
    vllm_lora_sync: LoraSync = field(
        default="adapter",
        metadata={
            "help": "Load only the adapter into vLLM, or merge it and push every weight as TRL does.",
        },
    )
    log_trees: bool = field(
        default=False,
        metadata={"help": "Whether to write every sampled tree to output_dir/trees, one JSON line per tree."},
    )

    @property
    def max_tree_depth(self) -> int:
        """Segments on the longest path: `ceil(max_completion_length / segment_length)`."""
        assert self.segment_length is not None, "set in __post_init__"
        return math.ceil(self.max_completion_length / self.segment_length)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tree_shape()
        self._check_initial_branching()
        _check_choice("branching_policy", self.branching_policy, BranchingPolicy)
        _check_choice("branch_schedule", self.branch_schedule, BranchSchedule)
        _check_choice("fallback_policy", self.fallback_policy, FallbackPolicy)
        _check_choice("advantage_estimator", self.advantage_estimator, AdvantageEstimator)
        _check_choice("tree_packing", self.tree_packing, TreePacking)
        _check_choice("vllm_lora_sync", self.vllm_lora_sync, LoraSync)
        _check_choice("leaf_weighting", self.leaf_weighting, LeafWeighting)
        if self.leaf_weighting == "inverse_branching" and self.beta != 0.0:
            raise ValueError(
                f"`leaf_weighting='inverse_branching'` weights the advantages, but not the KL term of "
                f"`beta={self.beta}`. Set `beta=0`, or `leaf_weighting='uniform'`."
            )
        self._check_stop_pattern()
        self._check_supported()

    def _check_tree_shape(self) -> None:
        _check_int("max_completion_length", self.max_completion_length)
        _check_int("branching_factor", self.branching_factor)
        if self.max_completion_length < 1:
            raise ValueError(f"`max_completion_length` is {self.max_completion_length}; it must be at least 1 token.")
        if self.segment_length is None:
            self.segment_length = math.ceil(self.max_completion_length / 14)
        _check_int("segment_length", self.segment_length)
        if not 1 <= self.segment_length <= self.max_completion_length:
            raise ValueError(
                f"`segment_length` is {self.segment_length}; it must be between 1 and `max_completion_length` "
                f"({self.max_completion_length}). Leave it out for the default of a fourteenth of that."
            )
        if not 1 <= self.branching_factor <= self.num_generations:
            raise ValueError(
                f"`branching_factor` is {self.branching_factor}; it must be between 1 (no branching) and "
                f"`num_generations` ({self.num_generations}), the number of completions of a tree. Lower the one or "
                "raise the other."
            )
        if not self.branching_temperature > 0:
            raise ValueError(
                f"`branching_temperature` is {self.branching_temperature}; it must be positive. A large value splits "
                "the branches evenly."
            )
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` is {self.temperature}; training samples and must be above 0. For evaluation of the "
                "most likely completion, sample it outside the trainer."
            )
        local_batch_size = self.per_device_train_batch_size * self.steps_per_generation
        if local_batch_size % self.num_generations != 0:
            raise ValueError(
                f"Each process generates `per_device_train_batch_size` ({self.per_device_train_batch_size}) x "
                f"`steps_per_generation` ({self.steps_per_generation}) = {local_batch_size} completions. "
                f"`num_generations` ({self.num_generations}) does not divide that: a tree would be split over "
                "processes. Change one of the three so that each process holds whole trees."
            )

    def _check_initial_branching(self) -> None:
        if self.initial_branching_factor is None:
            self.initial_branching_factor = [
                self.num_generations if self.branching_factor == 1 else self.branching_factor
            ]
        value: Any = self.initial_branching_factor
        bounds = list(value) if isinstance(value, list | tuple) else [value]
        for bound in bounds:
            _check_int("initial_branching_factor", bound)
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
        if self.stop_pattern is None:
            return
        if not isinstance(self.stop_pattern, str):
            raise TypeError(f"`stop_pattern` is {self.stop_pattern!r}; give a regular expression as text.")
        try:
            re.compile(self.stop_pattern)
        except re.error as error:
            raise ValueError(
                f"`stop_pattern` is {self.stop_pattern!r}, which is no regular expression: {error}. Give a Python "
                r"pattern such as '\\boxed\{[^}]*\}'."
            ) from error
        if re.search(self.stop_pattern, "") is not None:
            raise ValueError(
                f"`stop_pattern` is {self.stop_pattern!r}, which matches the empty text, so every path would end at "
                "its first token. Make it match at least one character."
            )
        if self.mask_truncated_completions:
            raise ValueError(
                "`stop_pattern` and `mask_truncated_completions=True` exclude each other: a path that the pattern "
                "ended has no EOS token, so its completion would be masked as truncated. Unset one of them."
            )

    def _check_supported(self) -> None:
        if self.use_vllm and self.vllm_mode != "colocate":
            raise ValueError(
                f"`vllm_mode` is {self.vllm_mode!r}, which is not supported yet: segments are driven inside this "
                "process. Set `vllm_mode='colocate'`."
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "`use_transformers_continuous_batching=True` is not supported: trees are sampled by an engine of "
                "their own. Leave it out, or set `use_vllm=True`."
            )
