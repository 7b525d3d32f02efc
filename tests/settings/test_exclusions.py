"""Settings and arguments that exclude each other: every conflict is refused, with the fix, and stands once."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.config import make
from treepo_trl import TreePOConfig, TreeSamplingConfig
from treepo_trl.command_line.engine_arguments import EXCLUSIONS, EngineArguments
from treepo_trl.settings import OF_TRAINING, OF_TREES, Exclusion
from treepo_trl.settings.arguments import check_arguments
from treepo_trl.settings.exclusions import OF_TRAINER


VLLM = {"use_vllm": True, "vllm_mode": "colocate"}
SERVERS = {"use_vllm": True, "vllm_mode": "server"}
AHEAD = {**SERVERS, "rollout_ahead": 1}
SHARED = {**VLLM, "vllm_share_base_weights": True}
SLEEPING = {**VLLM, "vllm_sleep_keeps_weights": True}
ARGUMENTS = ("tools", "rollout_func", "environment_factory")

# Settings and arguments, and what the message says beside the names of those.
CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"branching_factor": 4}, "`branch_schedule='sqrt'` sets the widths"),
    ({"initial_branching_factor": [2, 4]}, "`branch_schedule='sqrt'` sets the widths"),
    ({"fallback_candidates": "all"}, "`fallback_policy='none'` cuts no path"),
    ({"max_tree_tokens": 5000}, "for offline sampling"),
    ({"max_tokens_per_micro_batch": 99, "tree_packing": "off"}, "Set `tree_packing='auto'`"),
    ({"subgroup_rejection": True, "advantage_estimator": "grpo"}, "Choose `treepo`"),
    ({"stop_pattern": "x", "mask_truncated_completions": True}, "Unset one of them"),
    ({"use_transformers_continuous_batching": True}, "Leave it out"),
    ({"tool_workers": 0, "tool_timeout": 1.0}, "Set `tool_workers` to 1 or more"),
    ({"vllm_share_base_weights": True}, "`use_vllm=True`"),
    ({**SHARED, "vllm_lora_sync": "merge"}, "`vllm_lora_sync='adapter'`"),
    ({**SHARED, "vllm_base_weights": "dequantized"}, "Set `vllm_base_weights='quantized'`"),
    ({**SHARED, "vllm_tensor_parallel_size": 2}, "`vllm_tensor_parallel_size` is 2. Unset one"),
    ({**SLEEPING, "vllm_lora_sync": "merge"}, "`vllm_lora_sync='adapter'`"),
    (SLEEPING, "Set `vllm_enable_sleep_mode=True`"),
    ({"rollout_ahead": 1}, "Set `use_vllm=True` and `vllm_mode='server'`"),
    ({**VLLM, "rollout_ahead": 1}, "Set `use_vllm=True` and `vllm_mode='server'`"),
    ({**AHEAD, "vllm_importance_sampling_correction": False}, "Set it, or leave"),
    ({**AHEAD, "dynamic_sampling_rounds": 2}, "chooses prompts by their rewards"),
    ({**AHEAD, "prompt_selection": "pass_rate"}, "chooses prompts by their rewards"),
    ({**AHEAD, "gradient_accumulation_steps": 2, "steps_per_generation": 1}, "Make it a multiple"),
    ({"vllm_server_adapter_dir": "/shared"}, "no server samples"),
    ({**SERVERS, "vllm_server_host": "me:x@host"}, "an address alone"),
    ({**SERVERS, "vllm_server_timeout": math.inf}, "is inf; it must be a number of seconds above 0"),
    ({**SERVERS, "vllm_server_timeout": 0}, "is 0; it must be a number of seconds above 0"),
    ({**SERVERS, "vllm_share_base_weights": True}, "`vllm_mode` is 'server'"),
    ({**SERVERS, "vllm_sleep_keeps_weights": True, "vllm_enable_sleep_mode": True}, "`vllm_mode` is 'server'"),
    ({**SERVERS, "vllm_enable_sleep_mode": True}, "`vllm_mode` is 'server'"),
    ({**SERVERS, "vllm_engine_kwargs": {"dtype": "float32"}}, "`vllm_mode` is 'server'"),
    ({**SERVERS, "vllm_base_weights": "quantized"}, "`vllm_mode` is 'server'"),
    ({**SERVERS, "vllm_tensor_parallel_size": 2}, "`vllm_mode` is 'server'"),
    ({**SERVERS, "vllm_model_impl": "transformers"}, "`vllm_mode` is 'server'"),
    ({**SERVERS, "vllm_gpu_memory_utilization": "auto"}, "`--gpu-memory-utilization`"),
    # What only a trainer knows, or what a command may still have changed before it
    ({**VLLM, "vllm_structured_outputs_regex": "a+"}, "Leave it out"),
    ({"vllm_gpu_memory_utilization": "auto"}, "`treepo-trl train` plans"),
    ({"vllm_engine_kwargs": {"dtype": "float32"}}, "`use_vllm` is false"),
    ({"dynamic_sampling_rounds": 1, "rollout_func": print}, "Leave one of them out"),
    ({"prompt_selection": "pass_rate", "rollout_func": print}, "Leave one of them out"),
    ({**AHEAD, "rollout_func": print}, "one batch at a time"),
    *(
        ({**changes, name: [print]}, message)
        for name in ("tools", "environment_factory")
        for changes, message in (
            ({**VLLM, "vllm_tensor_parallel_size": 2}, "Set it to 1"),
            ({**SERVERS, "world_size": 2}, "2 processes"),
            (AHEAD, "one batch at a time"),
            ({"rollout_func": print}, "Leave one of them out"),
        )
    ),
]


def told(folder: Path, changes: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    """What the config says about these settings, or else the trainer about these arguments."""
    patch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: True)
    patch.setattr(TreePOConfig, "world_size", changes.get("world_size", 1))
    settings = {name: value for name, value in changes.items() if name not in (*ARGUMENTS, "world_size")}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the parts are matched by the tests
        check_arguments(make(folder, **settings), **{name: changes.get(name) for name in ARGUMENTS})
    return str(error.value)


@pytest.mark.parametrize(("changes", "message"), CONFLICTS, ids=str)
def test_a_conflict_is_told_with_its_settings_and_the_fix(
    tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = told(tmp_path, changes, monkeypatch)
    assert message in text
    told_otherwise = {*SERVERS, "world_size", "vllm_enable_sleep_mode"}
    assert [name for name in changes if name not in text and name not in told_otherwise] == []


def test_each_conflict_has_an_example_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [told(tmp_path, changes, monkeypatch) for changes, _ in CONFLICTS]
    for each in (*OF_TREES, *OF_TRAINING, *OF_TRAINER):
        words = re.split(r"\{0[^}]*\}", each.message)
        assert any(all(part in text for part in words) for text in texts), each.message


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
            assert hasattr(settings, name) or name in ARGUMENTS
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
