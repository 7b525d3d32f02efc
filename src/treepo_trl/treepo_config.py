"""`TreePOConfig`: what TreePO adds to [`~trl.GRPOConfig`], with every check that needs no model."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from trl.trainer.grpo_config import GRPOConfig

from .engines import SamplingOptions
from .sampling.branching import BranchSchedule
from .sampling.config import FallbackPolicy, TreeSamplingConfig
from .settings import OF_TRAINING, Ranges, check_exclusions, check_fields, keep_credentials, server_urls
from .settings.grpo import check_dictionary, check_grpo_fields, check_parsed
from .turns import EnvironmentForking
from .update.advantages import EXACT_ESTIMATORS, AdvantageEstimator
from .update.packing import TreePacking


LeafWeighting = Literal["auto", "uniform", "inverse_branching"]
LoraSync = Literal["adapter", "merge"]
BaseWeights = Literal["auto", "quantized", "dequantized"]
EngineCheck = Literal["warn", "error", "off"]
PromptSelection = Literal["pass_rate", "off"]

_RANGES: Ranges = {
    "reward_timeout": (lambda value: value > 0, "above 0; leave it out for no limit"),
    "tool_workers": (lambda value: value >= 0, "0 (calls run in the main thread, one after another) or more"),
    "tool_timeout": (lambda value: value > 0, "above 0; leave it out for no limit"),
    "max_tool_answer_tokens": (lambda value: value >= 1, "at least 1; leave it out for no limit"),
    "rollout_ahead": (
        lambda value: value in (0, 1),
        "0 or 1: trees of two updates ago gain little and are off-policy",
    ),
    "dynamic_sampling_rounds": (lambda value: value >= 0, "0 (train on every prompt as it comes) or more"),
    "max_tokens_per_micro_batch": (
        lambda value: value >= 1,
        "from 1 on, about the length of a few completions or more; leave it out for no limit",
    ),
}


@dataclass
class TreePOConfig(TreeSamplingConfig, GRPOConfig):
    """
    Configuration of the [`TreePOTrainer`]: all fields of [`~trl.GRPOConfig`] and of [`TreeSamplingConfig`], and more.

    Each field's `help` describes it, and docs/settings.md prints them all. Equations and sections are those of
    [TreePO](https://huggingface.co/papers/2508.17445).
    """

    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "vllm_engine_kwargs"]  # JSON on the command line

    if TYPE_CHECKING:  # optional in GRPOConfig, but always set after its own __post_init__
        steps_per_generation: int = 1

    branch_schedule: BranchSchedule = field(
        default="sqrt",  # lengths are known from the batch before, and a gradient has noise
        metadata=dict(TreeSamplingConfig.__dataclass_fields__["branch_schedule"].metadata),
    )
    fallback_policy: FallbackPolicy = field(
        default="none",  # a late path is decoded behind all others, and the update does without it
        metadata=dict(TreeSamplingConfig.__dataclass_fields__["fallback_policy"].metadata),
    )
    advantage_estimator: AdvantageEstimator = field(
        default="optimal_baseline",
        metadata={
            "help": "How rewards become advantages. A node's value is the mean reward of the leaves below it. "
            "Three give a completion one advantage. `treepo` is the mean of the reward minus the values of the "
            "prompt and of each shared node on the path (Eq. 5 of the paper). `treepo_size_weighted` weights "
            "these terms by the number of leaves (Eq. 6). `grpo` takes the prompt's value alone. Five give each "
            "segment its own. `treepo_segment` leaves out the nodes that hold no alternative to the segment. "
            "`value_difference` is the value of the segment's node minus its parent's. `treerl` adds that node's "
            "value minus the prompt's, and divides by the square root of the leaves below. `leave_one_out` is "
            "the node's value minus that of the leaves which are not below it, near relatives counting most. "
            "`optimal_baseline` weights these leaves by how unsure the model was: the sum of 1 - p over their "
            "tokens. It has less noise where right and wrong completions differ in that. With weighted leaves and "
            "`fallback_policy='none'` the mean of `leave_one_out` is the policy gradient. That of "
            "`optimal_baseline` has the bias of a ratio beside it: none was seen with `sqrt`, up to 0.04 of the "
            "gradient with `early` and 3 to 8 leaves. Paper: `treepo`."
        },
    )
    subgroup_rejection: bool = field(
        default=False,
        metadata={
            "help": "Whether subgroups whose rewards are all equal are left out (Eq. 7 of the paper). Only the three "
            "estimators `treepo`, `treepo_size_weighted` and `treepo_segment` have subgroups, and the others refuse "
            "it. Paper: false; set it as an experiment."
        },
    )
    leaf_weighting: LeafWeighting = field(
        default="auto",
        metadata={
            "help": "Weight of each leaf in the groups' means and in its advantages. `uniform` weights all alike, as "
            "the paper does. `inverse_branching` weights by the product of 1/children along the path. That undoes "
            "the tilt that branching puts on the leaves. A fallback's leaves then count behind their stem alone. "
            "`auto`: that for `leave_one_out` and `optimal_baseline`, whose mean it makes the policy gradient, else "
            "`uniform`. A KL term (`beta`) and an entropy term weight all leaves alike in any case."
        },
    )
    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={
            "help": "How often per batch, at most, prompts whose completions all have the same reward are replaced by "
            "fresh ones. 0 trains on every prompt. Paper: 2. Set 2 if the metric `frac_reward_zero_std` is high with "
            "`scale_rewards='group'`; each round samples at most one batch more. Prompts with equal rewards after the "
            "last round stay, with advantages of 0. Prompts are drawn one after another, each once per pass over the "
            "dataset. So a subclass with its own sampler or data loader is refused."
        },
    )
    prompt_selection: PromptSelection = field(
        default="off",
        metadata={
            "help": "Whether prompts are passed over that were nearly always right or always wrong. `off`: none. "
            "`pass_rate` takes a prompt of pass rate p with the chance 4 p (1 - p), a fifth at least. For any rewards "
            "that is twice the share of pairs of its completions that differ in theirs. Set it where many prompts are "
            "hopeless or solved, for several passes over the dataset. Not with `rollout_ahead` or a `rollout_func`."
        },
    )
    tree_packing: TreePacking = field(
        default="auto",
        metadata={
            "help": "Whether the update forwards rows that share prefixes as one row, with every shared token once. "
            "`auto` does so where it pays. `sdpa` and `flex` always do, with PyTorch's scaled dot product attention "
            "or with FlexAttention, which compiles and needs CUDA. `off` never does, which reproduces TRL's "
            "micro-batches exactly. Set `sdpa` where FlexAttention does not compile. A model that a tree mask cannot "
            "serve keeps plain rows, with a warning."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most unique tokens, prompts included, that one forward holds for the backward pass, from 1 on. "
            "Default: no limit. A micro-batch with more is cut between its rows, into whole trees where they fit; a "
            "single row may be longer. All pieces but the largest are forwarded once more in the backward pass. The "
            "gradient does not depend on the cut. Set it to what fits if whole trees do not, with whole trees in "
            "`per_device_train_batch_size`. Not with `tree_packing='off'`, FSDP, DeepSpeed or a load-balancing loss "
            "(`router_aux_loss_coef=0` turns that off)."
        },
    )
    vllm_lora_sync: LoraSync = field(
        default="adapter",
        metadata={
            "help": "How a LoRA policy reaches vLLM. `adapter` loads the adapter alone into the engine. `merge` is "
            "TRL's way: merge it into the base and push every weight. Set `merge` if vLLM cannot serve the adapter "
            "(DoRA, `modules_to_save`)."
        },
    )
    vllm_gpu_memory_utilization: float | str = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=0.3,
        metadata={
            "help": "Fraction of the card that vLLM may use, as in GRPOConfig. `auto` is what the planned training "
            "leaves of it, for `treepo-trl train` and `plan` on one GPU."
        },
    )
    vllm_engine_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of `vllm.LLM`, on a card also `speculative_config`. Those that have a setting "
            "of their own, or that trees, the plan or the checks rely on, are refused. Default: none, but the `dtype` "
            "of `bf16` or `fp16`."
        },
    )
    vllm_base_weights: BaseWeights = field(
        default="auto",
        metadata={
            "help": "What vLLM serves the adapter of a QLoRA policy on. `dequantized`: the policy's 4-bit weights "
            "written out in the precision of its other weights, which is faster. `quantized`: these 4-bit weights "
            "themselves, which takes least memory. `auto`: dequantized where that fits, or where vLLM cannot hold "
            "them in 4 bits."
        },
    )
    vllm_share_base_weights: bool = field(
        default=False,
        metadata={
            "help": "Whether a LoRA or QLoRA policy computes with the engine's copy of the frozen base. The card then "
            "holds the base once. Set it if memory is short. Weights are shared where both are equal bit for bit, so "
            "load the policy in the engine's precision. A QLoRA engine is then `quantized`. Needs `use_vllm=True` and "
            "`vllm_lora_sync='adapter'`. Not with tensor parallelism, FSDP or DeepSpeed."
        },
    )
    vllm_sleep_keeps_weights: bool = field(
        default=False,
        metadata={
            "help": "Whether a sleeping engine frees its cache alone. Otherwise its weights move to the processor's "
            "memory and back at each generation, unless they are shared. Set it if the update needs the cache's "
            "memory but not that of the weights. Needs `vllm_enable_sleep_mode=True` and `vllm_lora_sync='adapter'`."
        },
    )
    vllm_server_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the servers of `vllm_mode='server'` find the policy: its adapter, or "
            "all weights. Default: a temporary folder, in memory where there is room. Set it to a shared disk if a "
            "server runs on another machine or in a container."
        },
    )
    rollout_ahead: int = field(
        default=0,
        metadata={
            "help": "Batches that are sampled ahead: 0, or 1 to sample the next batch while this one is updated. Its "
            "trees are then one update old, which TRL's importance ratio corrects "
            "(`vllm_importance_sampling_correction=True`). Set 1 where servers sample "
            "(`vllm_mode='server'`) and sampling takes about as long as the update. Not with dynamic sampling, tools, "
            "environments or a `rollout_func`."
        },
    )
    engine_check: EngineCheck = field(
        default="warn",
        metadata={
            "help": "What happens when vLLM does not compute the policy. Its log-probabilities are compared with the "
            "policy's in every batch. At the start and after a resume a moved LoRA adapter is compared too. `warn` "
            "says what differs and goes on. `error` stops there. `off` does not look. Set `error` for a long run that "
            "nobody watches."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that one call of a reward function may take, for all completions of a process. Then "
            "training ends with an error that names the function. Default: no limit; a call of more than a minute is "
            "a warning that names it. Set it if a reward function can hang. An asynchronous function is ended where "
            "it awaits, and a reward model never."
        },
    )
    tool_workers: int = field(
        default=16,
        metadata={
            "help": "Turns whose tool calls run at once, each in a thread, while other paths are sampled. 0 runs them "
            "in the main thread, one after another, as GRPOTrainer does. Set 0 if a tool or an environment works in "
            "one thread alone, as sqlite, `signal` and Playwright do."
        },
    )
    tool_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that one tool call may take. Then its answer is an error. On an environment, whose state "
            "nobody knows then, the path ends and has no reward. A call that is not asynchronous goes on in its "
            "thread, because nothing can stop it. Default: no limit. Not with `tool_workers=0`."
        },
    )
    max_tool_answer_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer of one tool call in tokens; what is longer is cut off, with a mark at its end. "
            "Default: no limit. An answer that leaves no room for a token in `max_completion_length` ends its path."
        },
    )
    environment_forking: EnvironmentForking = field(
        default="auto",
        metadata={
            "help": "What a path gets that parts from another one behind a call on an environment. `auto`: "
            "`_fork()` of the environment if it has that method, else a deep copy if it has `__deepcopy__`, else "
            "`none`. `deepcopy`: a deep copy. `replay`: a fresh environment, in which the calls so far are run again; "
            "other answers than before are an error. `none`: paths part at the prompt alone, and each has its own "
            "environment, as in GRPOTrainer."
        },
    )
    log_trees: bool = field(
        default=False,
        metadata={
            "help": "Whether every sampled tree is written to the folder `trees` in `output_dir`, one line of JSON "
            "each. Set it to look at trees."
        },
    )

    def __setattr__(self, name: str, value: object) -> None:
        # Loggers and checkpoints publish settings, so these hold no password, however it was set.
        if name == "vllm_server_base_url" and isinstance(value, str):
            value = keep_credentials(value)
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        for name in ("tree_packing", "engine_check", "prompt_selection"):
            if getattr(self, name) is False:  # what a bare `off` is in YAML
                super().__setattr__(name, "off")
        check_dictionary("vllm_engine_kwargs", self.vllm_engine_kwargs)
        check_grpo_fields(
            self, but={*(each.name for each in fields(TreeSamplingConfig)), "vllm_gpu_memory_utilization"}
        )
        check_fields(self, TreePOConfig, _RANGES)
        TreeSamplingConfig.__post_init__(self)
        GRPOConfig.__post_init__(self)
        self._check_parsed()
        self._check_temperature()
        self.sampling_options()
        check_exclusions(self, OF_TRAINING)
        self._check_batches()
        if self.use_vllm and self.vllm_mode == "server":
            server_urls(self.vllm_server_base_url, self.vllm_server_host, self.vllm_server_port)

    @property
    def weights_leaves(self) -> bool:
        """Whether leaves are weighted by the inverse of branching."""
        if self.leaf_weighting == "auto":
            return self.advantage_estimator in EXACT_ESTIMATORS
        return self.leaf_weighting == "inverse_branching"

    @property
    def averages_rows(self) -> bool:
        """Whether the loss averages over rows, and not over tokens."""
        return self.loss_type in ("grpo", "dr_grpo", "sapo", "luspo")

    @property
    def chooses_prompts(self) -> str:
        """The setting that draws prompts here and not in the data loader; empty if there is none."""
        if self.dynamic_sampling_rounds > 0:
            return f"dynamic_sampling_rounds={self.dynamic_sampling_rounds}"
        return "" if self.prompt_selection == "off" else f"prompt_selection={self.prompt_selection!r}"

    @property
    def micro_steps_per_batch(self) -> int:
        """Micro-batches that are trained on one generation batch."""
        return self.steps_per_generation * self.num_iterations

    def generation_options(self) -> dict[str, object]:
        """`generation_kwargs`, empty where there are none."""
        return dict(cast("dict[str, object]", self.generation_kwargs or {}))

    def sampling_options(self) -> SamplingOptions:
        """
        How tokens are drawn in training: the settings of these names, but `generation_kwargs` go first.

        Raises:
            ValueError: for a value outside of its range.
        """
        set_here = {each.name: getattr(self, each.name) for each in fields(SamplingOptions)}
        options = {name: value for name, value in set_here.items() if value is not None}  # TRL takes None for no limit
        SamplingOptions(**options)  # the settings' own errors
        given = {name: cast(int, value) for name, value in self.generation_options().items() if name in set_here}
        try:
            return SamplingOptions(**{**options, **given})
        except (TypeError, ValueError) as error:
            raise type(error)(f"`generation_kwargs`: {error}") from error

    def _check_parsed(self) -> None:
        """Values of which a field's annotation says no more than that text is among them."""
        check_parsed("generation_kwargs", self.generation_kwargs, '{"top_p": 0.9}')
        check_parsed("vllm_engine_kwargs", self.vllm_engine_kwargs, '{"attention_backend": "TRITON_ATTN"}')
        share = self.vllm_gpu_memory_utilization
        if isinstance(share, str) and share != "auto":
            raise TypeError(f"`vllm_gpu_memory_utilization` is {share!r}; it must be a number, or 'auto'.")

    def _check_temperature(self) -> None:
        temperature = self.generation_options().get("temperature", self.temperature)
        if temperature != self.temperature:
            raise ValueError(
                f"`generation_kwargs` has temperature {temperature} and `temperature` is {self.temperature}: "
                "completions would be sampled with the one and updated with the other. Set `temperature` alone."
            )

    def _check_batches(self) -> None:
        """Batches are of whole trees, and those that are sampled ahead end with an optimizer step."""
        local_batch_size = self.per_device_train_batch_size * self.steps_per_generation
        if local_batch_size % self.num_generations != 0:
            raise ValueError(
                f"Each process generates `per_device_train_batch_size` ({self.per_device_train_batch_size}) x "
                f"`steps_per_generation` ({self.steps_per_generation}) = {local_batch_size} completions. "
                f"`num_generations` ({self.num_generations}) does not divide that: a tree would be split over "
                "processes. Change one of the three so that each process holds whole trees."
            )
        if self.rollout_ahead and self.micro_steps_per_batch % self.gradient_accumulation_steps:
            raise ValueError(
                f"`rollout_ahead={self.rollout_ahead}`, but a batch (`steps_per_generation` "
                f"{self.steps_per_generation} x `num_iterations` {self.num_iterations}) must end with an optimizer "
                f"step of {self.gradient_accumulation_steps} micro-batches. Make it a multiple of "
                "`gradient_accumulation_steps`, or leave `rollout_ahead` out."
            )
