"""`TreePOConfig`: what TreePO adds to [`~trl.GRPOConfig`], with every check that needs no model."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trl.trainer.grpo_config import GRPOConfig

from .sampling.config import TreeSamplingConfig, check_choice, check_int
from .update.advantages import AdvantageEstimator
from .update.packing import TreePacking


LeafWeighting = Literal["uniform", "inverse_branching"]
LoraSync = Literal["adapter", "merge"]
BaseWeights = Literal["auto", "quantized", "dequantized"]


@dataclass
class TreePOConfig(TreeSamplingConfig, GRPOConfig):
    # docstyle-ignore
    r"""
    Configuration of the [`TreePOTrainer`].

    Extends [`~trl.GRPOConfig`]; `num_generations` is the tree width W and `max_completion_length` the cap d*l on a
    path's tokens. The fields of [`TreeSamplingConfig`] shape the tree: segments, branching, fallback and early stop.
    Paper sections refer to [TreePO](https://huggingface.co/papers/2508.17445).

    Parameters:
        > Parameters that control the update

        advantage_estimator (`str`, *optional*, defaults to `"treepo"`):
            `"treepo"` (Eq. 5), `"treepo_size_weighted"` (Eq. 6), or `"grpo"` (the query group alone), which give a
            completion one value; `"treepo_segment"` (groups that hold alternatives to the segment),
            `"value_difference"` (value of the segment's node minus its parent's), `"treerl"` (that plus the node's
            value minus the query's, over the root of its leaves), or `"leave_one_out"` (value of the node minus that
            of the leaves that are not below it), which give a value to each segment.
        subgroup_rejection (`bool`, *optional*, defaults to `False`):
            Leave out subgroups whose rewards are all equal (Eq. 7). Only for the three estimators with `treepo` in
            their names.
        leaf_weighting (`str`, *optional*, defaults to `"uniform"`):
            `"inverse_branching"` weights each leaf by the product of 1/children along its path, in the group means and
            in its advantages, which undoes the tilt that branching puts on the leaf distribution. Not with a KL term
            (`beta`), which would stay unweighted.
        dynamic_sampling_rounds (`int`, *optional*, defaults to `0`):
            How often at most, per batch, prompts whose completions all have the same reward are replaced by fresh ones
            and sampled again. Prompts are then drawn one after another, each once per pass over the dataset; those
            that still have equal rewards after the last round stay, with advantages of 0.
        tree_packing (`str`, *optional*, defaults to `"auto"`):
            Whether rows that share prefixes are forwarded once per unique token: `"off"` never, `"sdpa"` and `"flex"`
            always, with that attention (FlexAttention compiles and needs CUDA), `"auto"` where it pays.
        max_tokens_per_micro_batch (`int`, *optional*):
            Unique tokens, prompts included, that are forwarded and kept for the backward pass at a time. A micro-batch
            that has more is cut between its rows, whole trees where they fit, and all its pieces but the largest are
            forwarded once more in the backward pass. The gradient does not depend on the cut. A row may be longer.

        > Parameters that control the engine and the logs

        vllm_lora_sync (`str`, *optional*, defaults to `"adapter"`):
            How a LoRA policy reaches vLLM: `"adapter"` loads only the adapter into the engine, `"merge"` is TRL's way
            (merge into the base model and push every weight).
        vllm_base_weights (`str`, *optional*, defaults to `"auto"`):
            What vLLM serves the adapter of a QLoRA policy on: `"dequantized"`, the policy's 4-bit weights written out
            in the precision of its other weights, `"quantized"`, these 4-bit weights themselves (least memory,
            slower), or `"auto"`, the first where it fits.
        vllm_share_base_weights (`bool`, *optional*, defaults to `False`):
            Whether a LoRA or QLoRA policy computes with the engine's copy of the frozen base, so that the card holds
            the base once. Weights are shared where both are equal bit for bit: the policy must be loaded in the
            engine's precision. A QLoRA engine is then `"quantized"`.
        vllm_sleep_keeps_weights (`bool`, *optional*, defaults to `False`):
            Whether a sleeping engine (`vllm_enable_sleep_mode`) frees its cache alone and its weights stay on the
            card, instead of moving to the processor's memory and back at each generation. Shared weights stay in any
            case.
        log_trees (`bool`, *optional*, defaults to `False`):
            Whether to write every sampled tree to `output_dir/trees`, one JSON line per tree.
    """

    if TYPE_CHECKING:  # optional in GRPOConfig, but always set after its own __post_init__
        steps_per_generation: int = 1

    advantage_estimator: AdvantageEstimator = field(
        default="treepo",
        metadata={
            "help": "Advantage of each segment: treepo (Eq. 5), treepo_size_weighted (Eq. 6), grpo, treepo_segment, "
            "value_difference, treerl, or leave_one_out.",
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
    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={
            "help": "How often at most prompts whose completions all have the same reward are replaced by fresh ones.",
        },
    )
    tree_packing: TreePacking = field(
        default="auto",
        metadata={
            "help": "Whether rows that share prefixes are forwarded once per unique token.",
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={"help": "Unique tokens that are forwarded and kept for the backward pass at a time."},
    )
    vllm_lora_sync: LoraSync = field(
        default="adapter",
        metadata={
            "help": "Load only the adapter into vLLM, or merge it and push every weight as TRL does.",
        },
    )
    vllm_base_weights: BaseWeights = field(
        default="auto",
        metadata={
            "help": "What vLLM serves the adapter of a 4-bit policy on: its weights dequantized, or its own.",
        },
    )
    vllm_share_base_weights: bool = field(
        default=False,
        metadata={"help": "Whether a LoRA or QLoRA policy computes with the engine's copy of the frozen base."},
    )
    vllm_sleep_keeps_weights: bool = field(
        default=False,
        metadata={"help": "Whether a sleeping engine frees its cache alone and its weights stay on the card."},
    )
    log_trees: bool = field(
        default=False,
        metadata={"help": "Whether to write every sampled tree to output_dir/trees, one JSON line per tree."},
    )

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        TreeSamplingConfig.__post_init__(self)
        check_choice("advantage_estimator", self.advantage_estimator, AdvantageEstimator)
        if self.tree_packing is False:  # what a bare `off` is in YAML
            self.tree_packing = "off"
        check_choice("tree_packing", self.tree_packing, TreePacking)
        check_choice("vllm_lora_sync", self.vllm_lora_sync, LoraSync)
        check_choice("vllm_base_weights", self.vllm_base_weights, BaseWeights)
        check_choice("leaf_weighting", self.leaf_weighting, LeafWeighting)
        if self.leaf_weighting == "inverse_branching" and self.beta != 0.0:
            raise ValueError(
                f"`leaf_weighting='inverse_branching'` weights the advantages, but not the KL term of "
                f"`beta={self.beta}`. Set `beta=0`, or `leaf_weighting='uniform'`."
            )
        self._check_training()
        self._check_micro_batches()
        self._check_supported()
        self._check_engine_weights()

    def _check_training(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` is {self.temperature}; training samples and must be above 0. For evaluation of the "
                "most likely completion, sample it outside the trainer."
            )
        if self.stop_pattern is not None and self.mask_truncated_completions:
            raise ValueError(
                "`stop_pattern` and `mask_truncated_completions=True` exclude each other: a path that the pattern "
                "ended has no EOS token, so its completion would be masked as truncated. Unset one of them."
            )
        offline = ""
        if self.fallback_policy == "none":
            offline = "fallback_policy='none'"
        elif self.max_tree_tokens is not None:
            offline = f"max_tree_tokens={self.max_tree_tokens}"
        if offline:
            raise ValueError(
                f"`{offline}` can leave a tree with fewer than `num_generations` completions, which training cannot "
                "use: it is for offline sampling with `TreeSamplingConfig`. Leave it out."
            )
        check_int("dynamic_sampling_rounds", self.dynamic_sampling_rounds)
        if self.dynamic_sampling_rounds < 0:
            raise ValueError(
                f"`dynamic_sampling_rounds` is {self.dynamic_sampling_rounds}. Set 0 to train on every prompt as it "
                "comes, or how often prompts without different rewards may be replaced, for example 2."
            )
        local_batch_size = self.per_device_train_batch_size * self.steps_per_generation
        if local_batch_size % self.num_generations != 0:
            raise ValueError(
                f"Each process generates `per_device_train_batch_size` ({self.per_device_train_batch_size}) x "
                f"`steps_per_generation` ({self.steps_per_generation}) = {local_batch_size} completions. "
                f"`num_generations` ({self.num_generations}) does not divide that: a tree would be split over "
                "processes. Change one of the three so that each process holds whole trees."
            )

    def _check_micro_batches(self) -> None:
        budget = self.max_tokens_per_micro_batch
        if budget is None:
            return
        check_int("max_tokens_per_micro_batch", budget)
        if budget < 1:
            raise ValueError(
                f"`max_tokens_per_micro_batch` is {budget}. Set a number of tokens from 1 on, about the length of a "
                "few completions or more, or leave it out."
            )
        if self.tree_packing == "off":
            raise ValueError(
                f"`max_tokens_per_micro_batch={budget}` counts tokens of packed rows, but `tree_packing` is 'off'. "
                "Set `tree_packing='auto'`, or lower `per_device_train_batch_size` instead."
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

    def _check_engine_weights(self) -> None:
        for name in ("vllm_share_base_weights", "vllm_sleep_keeps_weights"):
            if getattr(self, name) and not (self.use_vllm and self.vllm_lora_sync == "adapter"):
                raise ValueError(
                    f"`{name}=True` is about the vLLM engine of a LoRA policy. It needs `use_vllm=True` and "
                    "`vllm_lora_sync='adapter'`."
                )
        if self.vllm_sleep_keeps_weights and not self.vllm_enable_sleep_mode:
            raise ValueError(
                "`vllm_sleep_keeps_weights=True` says how the engine sleeps, but it does not sleep. Set "
                "`vllm_enable_sleep_mode=True`, or leave it out."
            )
        if not self.vllm_share_base_weights:
            return
        if self.vllm_base_weights == "dequantized":
            raise ValueError(
                "`vllm_share_base_weights=True` needs the same weights in policy and engine, but "
                "`vllm_base_weights='dequantized'` has them in 4 and in 16 bits. Set `vllm_base_weights='quantized'`, "
                "or unset one of the two."
            )
        if self.vllm_tensor_parallel_size > 1:
            raise ValueError(
                "`vllm_share_base_weights=True` needs an engine that holds whole weights, but "
                f"`vllm_tensor_parallel_size` is {self.vllm_tensor_parallel_size}. Unset one of the two."
            )
