"""Settings and arguments that exclude each other: every conflict is refused, with the fix, and stands once."""

import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.config import make
from treepo_trl import TreePOConfig, TreeSamplingConfig
from treepo_trl.commands.engine_arguments import EXCLUSIONS, EngineArguments
from treepo_trl.settings import OF_TRAINING, OF_TREES, Exclusion, check_exclusions
from treepo_trl.settings.arguments import check_arguments
from treepo_trl.settings.exclusions import OF_TRAINER


VLLM = {"use_vllm": True, "vllm_mode": "colocate"}
SERVERS = {"use_vllm": True, "vllm_mode": "server"}
AHEAD = {**SERVERS, "rollout_ahead": 1}
SHARED = {**VLLM, "vllm_share_base_weights": True}

# Settings, and parts of the message.
OF_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"branching_factor": 4}, "`branching_factor` is 4, but `branch_schedule='sqrt'` sets the widths ... 'early'"),
    ({"initial_branching_factor": [2, 4]}, "`initial_branching_factor` is [2, 4], but `branch_schedule='sqrt'` sets"),
    ({"fallback_candidates": "all"}, "`fallback_candidates` is 'all' ... `fallback_policy='root'` cuts no path"),
    ({"fallback_policy": "none"}, "`fallback_policy='none'` ... fewer than `num_generations` ... offline"),
    ({"max_tree_tokens": 5000}, "`max_tree_tokens=5000` ... fewer than `num_generations` ... offline"),
    (
        {"max_tokens_per_micro_batch": 99, "tree_packing": "off"},
        "`max_tokens_per_micro_batch=99` ... `tree_packing` is 'off' ... Set `tree_packing='auto'`",
    ),
    (
        {"subgroup_rejection": True, "advantage_estimator": "grpo"},
        "`subgroup_rejection=True` ... `advantage_estimator='grpo'` has none ... Choose `treepo`",
    ),
    (
        {"stop_pattern": "x", "mask_truncated_completions": True},
        "`stop_pattern` and `mask_truncated_completions=True` ... Unset one",
    ),
    (
        {"use_transformers_continuous_batching": True},
        "`use_transformers_continuous_batching=True` is not supported ... Leave it out",
    ),
    ({"tool_workers": 0, "tool_timeout": 1.0}, "`tool_timeout=1.0` needs threads ... Set `tool_workers` to 1"),
    ({"vllm_share_base_weights": True}, "`vllm_share_base_weights=True` ... `use_vllm=True`"),
    ({**SHARED, "vllm_lora_sync": "merge"}, "`vllm_share_base_weights=True` ... `vllm_lora_sync='adapter'`"),
    (
        {**VLLM, "vllm_sleep_keeps_weights": True, "vllm_lora_sync": "merge"},
        "`vllm_sleep_keeps_weights=True` ... `vllm_lora_sync='adapter'`",
    ),
    (
        {**VLLM, "vllm_sleep_keeps_weights": True},
        "`vllm_sleep_keeps_weights=True` ... does not sleep ... `vllm_enable_sleep_mode=True`",
    ),
    (
        {**SHARED, "vllm_base_weights": "dequantized"},
        "`vllm_share_base_weights=True` ... in 4 and in 16 bits ... 'quantized'",
    ),
    (
        {**SHARED, "vllm_tensor_parallel_size": 2},
        "`vllm_share_base_weights=True` ... `vllm_tensor_parallel_size` is 2",
    ),
    ({"rollout_ahead": 1}, "an engine in this process ... Set `use_vllm=True` and `vllm_mode='server'`"),
    ({**VLLM, "rollout_ahead": 1}, "shares its memory and its main thread with the update"),
    ({**AHEAD, "vllm_importance_sampling_correction": False}, "one update old ... uncorrected. Set it, or leave"),
    ({**AHEAD, "dynamic_sampling_rounds": 2}, "`rollout_ahead=1`, but `dynamic_sampling_rounds=2` chooses prompts by"),
    ({**AHEAD, "prompt_selection": "pass_rate"}, "`rollout_ahead=1`, but `prompt_selection='pass_rate'` chooses"),
    (
        {**AHEAD, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
        "must end with an optimizer step of 2 micro-batches. Make it a multiple",
    ),
    ({"vllm_server_adapter_dir": "/shared"}, "`vllm_server_adapter_dir` ... no server samples"),
    ({**SERVERS, "vllm_server_host": "me:x@host"}, "`vllm_server_host` must be a name or an address alone"),
    ({**SERVERS, "vllm_server_timeout": math.inf}, "`vllm_server_timeout` is inf ... number of seconds above 0"),
    ({**SERVERS, "vllm_server_timeout": 0}, "`vllm_server_timeout` is 0 ... number of seconds above 0"),
    *(
        (
            {**SERVERS, name: value},
            f"`{name}={value!r}` is about an engine in this process ... `vllm_mode` is 'server'",
        )
        for name, value in {
            "vllm_share_base_weights": True,
            "vllm_enable_sleep_mode": True,
            "vllm_engine_kwargs": {"dtype": "float32"},
            "vllm_base_weights": "quantized",
            "vllm_tensor_parallel_size": 2,
            "vllm_model_impl": "transformers",
        }.items()
    ),
    (
        {**SERVERS, "vllm_sleep_keeps_weights": True, "vllm_enable_sleep_mode": True},
        "`vllm_sleep_keeps_weights=True` is about an engine in this process ... `vllm_mode` is 'server'",
    ),
    ({**SERVERS, "vllm_gpu_memory_utilization": "auto"}, "'auto' ... `--gpu-memory-utilization`"),
]

# Settings, arguments that are given beside them, and a pattern of the message.
OF_ARGUMENTS: list[tuple[dict[str, Any], list[str], str]] = [
    *(
        (settings, [*given, name], message.format(name))
        for name in ("tools", "environment_factory")
        for settings, given, message in (
            (
                {**VLLM, "vllm_tensor_parallel_size": 2},
                [],
                "`{}` with `vllm_tensor_parallel_size=2` is not .* Set it to",
            ),
            ({**SERVERS, "world_size": 2}, [], "`{}` with `vllm_mode='server'` and 2 processes is not supported"),
            (AHEAD, [], "`rollout_ahead=1` samples .* but `{}` has"),
            ({}, ["rollout_func"], "`rollout_func` samples by itself, so `{}` would not be used. Leave one of"),
        )
    ),
    (AHEAD, ["rollout_func"], "`rollout_ahead=1` samples .* but `rollout_func` has"),
    ({"dynamic_sampling_rounds": 1}, ["rollout_func"], "`dynamic_sampling_rounds=1` chooses .* Leave one of"),
    ({"prompt_selection": "pass_rate"}, ["rollout_func"], "`prompt_selection='pass_rate'` chooses .* Leave one of"),
    ({**VLLM, "vllm_structured_outputs_regex": "a+"}, [], "`vllm_structured_outputs_regex` is not .* Leave it out"),
    ({"vllm_gpu_memory_utilization": "auto"}, [], "is 'auto', which `treepo-trl train` plans"),
    ({"vllm_engine_kwargs": {"dtype": "float32"}}, [], "`vllm_engine_kwargs` is for vLLM, but `use_vllm` is false"),
]


def arguments_of(*names: str) -> dict[str, Any]:
    return {name: [print] if name in names else None for name in ("tools", "rollout_func", "environment_factory")}


def conflicts(settings: object, each: Exclusion, **arguments: Any) -> bool:
    try:
        check_exclusions(settings, [each], **arguments)
    except ValueError:
        return True
    return False


def unchecked(**changes: Any) -> SimpleNamespace:
    """Settings as a config has them, though they exclude each other."""
    settings = {each.name: each.default for each in fields(TreePOConfig)} | {"world_size": 1} | changes
    derived: Any = TreePOConfig
    config = SimpleNamespace(**settings)
    config.chooses_prompts, config.own_widths = derived.chooses_prompts.fget(config), derived.own_widths.fget(config)
    return config


@pytest.mark.parametrize(("changes", "message"), OF_SETTINGS, ids=str)
def test_settings_that_exclude_each_other_are_named_with_the_fix(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the parts are matched below
        make(tmp_path, **changes)
    for part in message.split(" ... "):
        assert part in str(error.value)


@pytest.mark.parametrize(("changes", "given", "message"), OF_ARGUMENTS, ids=str)
def test_arguments_that_settings_exclude_are_named_with_the_fix(
    tmp_path: Path, changes: dict[str, Any], given: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: True)
    settings = dict(changes)
    monkeypatch.setattr(TreePOConfig, "world_size", settings.pop("world_size", 1))
    with pytest.raises(ValueError, match=message):
        check_arguments(make(tmp_path, **settings), **arguments_of(*given))


def test_each_conflict_has_an_example_here() -> None:
    of_settings = [unchecked(**changes) for changes, _ in OF_SETTINGS]
    lacking = [each.message for each in (*OF_TREES, *OF_TRAINING) if not any(conflicts(s, each) for s in of_settings)]
    of_arguments = [(unchecked(**changes), arguments_of(*given)) for changes, given, _ in OF_ARGUMENTS]
    for each in OF_TRAINER:
        if not any(conflicts(settings, each, **arguments) for settings, arguments in of_arguments):
            lacking.append(each.message)
    assert lacking == []


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        (TreeSamplingConfig, OF_TREES),
        (TreePOConfig, OF_TRAINING),
        (TreePOConfig, OF_TRAINER),
        (EngineArguments, EXCLUSIONS),
    ],
)
def test_a_conflict_stands_once_and_its_names_exist(settings: type, table: tuple[Exclusion, ...]) -> None:
    seen: list[object] = []
    for each in table:
        for name in (*each.when, *each.needs):
            assert hasattr(settings, name) or name in arguments_of()
        assert (each.when, each.needs) not in seen
        seen.append((each.when, each.needs))


@pytest.mark.parametrize(
    "changes",
    [
        {**SHARED, "vllm_enable_sleep_mode": True, "vllm_sleep_keeps_weights": True, "vllm_base_weights": "quantized"},
        {**AHEAD, "vllm_server_adapter_dir": "/shared", "vllm_engine_kwargs": {}},
        {**SERVERS, "vllm_server_base_url": "http://a", "vllm_server_host": "me@host"},  # the address goes first
        {"branch_schedule": "spread", "branching_factor": 4, "initial_branching_factor": [2, 4]},
        {"branching_factor": 1, "initial_branching_factor": [2, 4]},  # independent completions
        {"advantage_estimator": "treepo", "subgroup_rejection": True, "tool_timeout": 1.0},
    ],
    ids=str,
)
def test_what_goes_together_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = make(tmp_path, **changes)
    assert {name: getattr(config, name) for name in changes} == changes
