"""Settings and arguments that exclude each other: a table for each place that checks, with each conflict once."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field


Conditions = Mapping[str, object]
"""By the name of a setting: its value, or a function that says whether a value is meant."""


@dataclass(frozen=True)
class Exclusion:
    """
    A conflict of settings, which go by their names, as their class stands above this table.

    Args:
        when (`Conditions`):
            What holds in the conflict, all of it.
        message (`str`):
            What was set, what is allowed and what to do. `{0.name}` is the value of a setting.
        needs (`Conditions`, *optional*):
            What resolves the conflict, if all of it holds.
    """

    when: Conditions
    message: str
    needs: Conditions = field(default_factory=dict[str, object])


def check_exclusions(settings: object, table: Iterable[Exclusion], **arguments: object) -> None:
    """
    Raise a `ValueError` for the first conflict of a table.

    Args:
        settings (`object`):
            Has the values of the settings.
        table (iterable of [`Exclusion`]):
            The conflicts.
        arguments (`object`):
            What else the table names, by its name.
    """

    def hold(conditions: Conditions) -> bool:
        for name, meant in conditions.items():
            value = arguments[name] if name in arguments else getattr(settings, name)
            if not (meant(value) if callable(meant) else value == meant):
                return False
        return True

    for each in table:
        if hold(each.when) and not (each.needs and hold(each.needs)):
            raise ValueError(each.message.format(settings))


def is_given(value: object) -> bool:
    """Whether a setting that is left out by default was set."""
    return value is not None


def one_of(*values: object) -> Callable[[object], bool]:
    """Whether a value is one of these, which need no hash."""
    return lambda value: value in values


def of_this_process(on_servers: Conditions, defaults: Mapping[str, object]) -> tuple[Exclusion, ...]:
    """Exclusions of what is about an engine in this process where servers sample."""
    return tuple(
        Exclusion(
            on_servers,
            f"`{name}={{0.{name}!r}}` is about an engine in this process, but `vllm_mode` is 'server'. Leave it out, "
            "and give the servers flags of their own (`vllm serve --help`).",
            needs={name: default},
        )
        for name, default in defaults.items()
    )


_SERVERS: Conditions = {"use_vllm": True, "vllm_mode": "server"}
_WITH_SUBGROUPS = ("treepo", "treepo_size_weighted", "treepo_segment")
OF_TREES = (
    *(
        Exclusion(
            {"own_widths": is_given},
            f"`{name}` is {{0.{name}}}, but `branch_schedule={{0.branch_schedule!r}}` sets the widths of a tree "
            f"itself. Leave `{name}` out, or set `branch_schedule='early'`, as in the paper.",
            needs={name: default},
        )
        for name, default in (("branching_factor", 2), ("initial_branching_factor", None))
    ),
    Exclusion(
        {"fallback_policy": one_of("root", "none")},
        "`fallback_candidates` is {0.fallback_candidates!r}, but `fallback_policy={0.fallback_policy!r}` cuts no "
        "path. Leave it out, or set `fallback_policy='random'`, as in the paper.",
        needs={"fallback_candidates": "finished"},
    ),
)
"""Conflicts among the settings of trees."""

OF_TRAINING = (
    Exclusion(
        {"subgroup_rejection": True},
        "`subgroup_rejection=True` leaves subgroups out, but `advantage_estimator={0.advantage_estimator!r}` has "
        f"none. Choose {', '.join(map('`{}`'.format, _WITH_SUBGROUPS))}, or set `subgroup_rejection=False`.",
        needs={"advantage_estimator": one_of(*_WITH_SUBGROUPS)},
    ),
    Exclusion(
        {"stop_pattern": is_given, "mask_truncated_completions": True},
        "`stop_pattern` and `mask_truncated_completions=True` exclude each other: a path that the pattern ended has "
        "no EOS token, so its completion would be masked as truncated. Unset one of them.",
    ),
    Exclusion(
        {"max_tree_tokens": is_given},
        "`max_tree_tokens={0.max_tree_tokens}` cuts paths for what others have cost, which would tilt the gradient: "
        "it is for offline sampling with `TreeSamplingConfig`. Leave it out.",
    ),
    Exclusion(
        {"max_tokens_per_micro_batch": is_given, "tree_packing": "off"},
        "`max_tokens_per_micro_batch={0.max_tokens_per_micro_batch}` counts tokens of packed rows, but `tree_packing` "
        "is 'off'. Set `tree_packing='auto'`, or lower `per_device_train_batch_size` instead.",
    ),
    Exclusion(
        {"use_transformers_continuous_batching": True},
        "`use_transformers_continuous_batching=True` is not supported, nor is `use_transformers_paged`, its old name: "
        "trees are sampled by an engine of their own. Leave it out, or set `use_vllm=True`.",
    ),
    Exclusion(
        {"tool_timeout": is_given, "tool_workers": 0},
        "`tool_timeout={0.tool_timeout}` needs threads: a call in the main thread cannot be left. Set `tool_workers` "
        "to 1 or more, or leave `tool_timeout` out.",
    ),
    # The weights of an engine in this process
    *(
        Exclusion(
            {name: True},
            f"`{name}=True` is about the vLLM engine of a LoRA policy. It needs `use_vllm=True` and "
            "`vllm_lora_sync='adapter'`.",
            needs={"use_vllm": True, "vllm_lora_sync": "adapter"},
        )
        for name in ("vllm_share_base_weights", "vllm_sleep_keeps_weights")
    ),
    Exclusion(
        {"vllm_share_base_weights": True, "vllm_base_weights": "dequantized"},
        "`vllm_share_base_weights=True` needs the same weights in policy and engine, but "
        "`vllm_base_weights='dequantized'` has them in 4 and in 16 bits. Set `vllm_base_weights='quantized'`, or "
        "unset one of the two.",
    ),
    Exclusion(
        {"vllm_share_base_weights": True},
        "`vllm_share_base_weights=True` needs an engine that holds whole weights, but `vllm_tensor_parallel_size` is "
        "{0.vllm_tensor_parallel_size}. Unset one of the two.",
        needs={"vllm_tensor_parallel_size": 1},
    ),
    Exclusion(
        {"vllm_sleep_keeps_weights": True},
        "`vllm_sleep_keeps_weights=True` says how the engine sleeps, but it does not sleep. Set "
        "`vllm_enable_sleep_mode=True`, or leave it out.",
        needs={"vllm_enable_sleep_mode": True},
    ),
    # A batch that is sampled ahead
    Exclusion(
        {"rollout_ahead": 1},
        "`rollout_ahead=1`, but an engine in this process shares its memory and its main thread with the update. Set "
        "`use_vllm=True` and `vllm_mode='server'`, or leave it out.",
        needs=_SERVERS,
    ),
    Exclusion(
        {"rollout_ahead": 1},
        "`rollout_ahead=1`, but its trees are one update old, and `vllm_importance_sampling_correction=False` leaves "
        "that uncorrected. Set it, or leave `rollout_ahead` out.",
        needs={"vllm_importance_sampling_correction": True},
    ),
    Exclusion(
        {"rollout_ahead": 1, "chooses_prompts": bool},
        "`rollout_ahead=1`, but `{0.chooses_prompts}` chooses prompts by their rewards, which are known when a batch "
        "is used. Leave one of them out.",
    ),
    # Servers
    Exclusion(
        {"vllm_server_adapter_dir": is_given},
        "`vllm_server_adapter_dir` is where servers find the policy, but no server samples. Set `use_vllm=True` and "
        "`vllm_mode='server'`, or leave it out.",
        needs=_SERVERS,
    ),
    Exclusion(
        {**_SERVERS, "vllm_server_base_url": None, "vllm_server_host": lambda host: "@" in host},
        "`vllm_server_host` must be a name or an address alone. A user and a password stand in "
        "`vllm_server_base_url`, such as 'http://user:password@host:8000'.",
    ),
    Exclusion(
        _SERVERS,
        "`vllm_server_timeout` is {0.vllm_server_timeout}; it must be a number of seconds above 0, after which a "
        "server that is silent counts as lost.",
        needs={"vllm_server_timeout": lambda seconds: 0 < seconds < math.inf},
    ),
    *of_this_process(
        _SERVERS,
        {
            "vllm_share_base_weights": False,
            "vllm_sleep_keeps_weights": False,
            "vllm_enable_sleep_mode": False,
            "vllm_engine_kwargs": one_of(None, {}),
            "vllm_base_weights": "auto",
            "vllm_tensor_parallel_size": 1,
            "vllm_model_impl": "vllm",
        },
    ),
    Exclusion(
        {**_SERVERS, "vllm_gpu_memory_utilization": "auto"},
        "`vllm_gpu_memory_utilization='auto'` plans a card that training and engine share, but `vllm_mode` is "
        "'server'. Leave it out, and give the servers `--gpu-memory-utilization`.",
    ),
)
"""Conflicts among the settings of a training."""


def _of_turns(name: str) -> tuple[Exclusion, ...]:
    """Conflicts of the settings with `tools` or `environment_factory`."""
    return (
        Exclusion(
            {"use_vllm": True, name: bool},
            f"`{name}` with `vllm_tensor_parallel_size={{0.vllm_tensor_parallel_size}}` is not supported: all "
            "processes of an engine must ask for the same segments at the same time, and tools take as long as they "
            "take. Set it to 1, with an engine per process.",
            needs={"vllm_tensor_parallel_size": 1},
        ),
        Exclusion(
            {**_SERVERS, name: bool},
            f"`{name}` with `vllm_mode='server'` and {{0.world_size}} processes is not supported: one of them "
            "samples for all, and has its own tools alone. Update in one process, or set `vllm_mode='colocate'`.",
            needs={"world_size": 1},
        ),
        Exclusion(
            {"rollout_func": is_given, name: bool},
            f"`rollout_func` samples by itself, so `{name}` would not be used. Leave one of them out; a rollout can "
            "call tools on its own.",
        ),
    )


OF_TRAINER = (
    *_of_turns("tools"),
    *_of_turns("environment_factory"),
    *(
        Exclusion(
            {"rollout_ahead": 1, name: bool},
            f"`rollout_ahead=1` samples a batch while another one is scored, but `{name}` has state or threads of its "
            "own, which one batch at a time may use. Leave one of them out.",
        )
        for name in ("tools", "environment_factory", "rollout_func")
    ),
    Exclusion(
        {"rollout_func": is_given, "chooses_prompts": bool},
        "`{0.chooses_prompts}` chooses prompts and samples them before they reach a `rollout_func`. Leave one of them "
        "out.",
    ),
    Exclusion(
        {"use_vllm": True, "vllm_structured_outputs_regex": is_given},
        "`vllm_structured_outputs_regex` is not supported: it would have to match each segment by itself. Leave it "
        "out.",
    ),
    Exclusion(
        {"vllm_gpu_memory_utilization": "auto"},
        "`vllm_gpu_memory_utilization` is 'auto', which `treepo-trl train` plans on one GPU. Elsewhere give a number "
        "above 0 and up to 1. `treepo-trl plan` says what fits.",
    ),
    Exclusion(
        {"vllm_engine_kwargs": bool},
        "`vllm_engine_kwargs` is for vLLM, but `use_vllm` is false. Set it, or leave them out.",
        needs={"use_vllm": True},
    ),
)
"""Conflicts with the arguments of a trainer, and among settings that a command may still have changed before it."""
