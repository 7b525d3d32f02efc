"""TreePOConfig: defaults, what follows from them, and the way from the command line, YAML and back."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from trl import GRPOConfig, TrlParser

from tests.support.config import NEW_FIELDS, make
from tests.support.paths import ROOT
from treepo_trl import TreePOConfig
from treepo_trl.update.advantages import tree_advantages


CHOICES = {name: get_args(f.type) for name, f in NEW_FIELDS.items() if get_origin(f.type) is Literal}
# A value other than the default for each new field.
OTHER: dict[str, Any] = {
    "segment_length": 32,
    "branching_factor": 4,
    "initial_branching_factor": [2, 8],
    "branching_policy": "low_prob",
    "branching_temperature": 0.5,
    "branching_temperature_end": 0.1,
    "branch_schedule": "spread",
    "expected_completion_length": 100,
    "fallback_policy": "low_prob",
    "fallback_candidates": "all",
    "stop_pattern": r"\\boxed\{[^}]*\}",
    "stop_repetition": False,
    "advantage_estimator": "treepo_size_weighted",
    "subgroup_rejection": True,
    "leaf_weighting": "inverse_branching",
    "dynamic_sampling_rounds": 2,
    "prompt_selection": "pass_rate",
    "tree_packing": "sdpa",
    "max_tokens_per_micro_batch": 16384,
    "vllm_lora_sync": "merge",
    "vllm_base_weights": "dequantized",
    "reward_timeout": 60.0,
    "tool_workers": 4,
    "tool_timeout": 30.0,
    "max_tool_answer_tokens": 256,
    "environment_forking": "replay",
    "engine_check": "error",
    "log_trees": True,
}
# What only the engine of an adapter has, and `vllm_lora_sync="merge"` not.
ENGINE_WEIGHTS: dict[str, Any] = {"vllm_share_base_weights": True, "vllm_sleep_keeps_weights": True}
LORA_ENGINE: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True}
SERVERS: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server"}
OF_SERVERS = {"vllm_server_adapter_dir": "/shared", "rollout_ahead": 1}


def test_new_fields_are_all_covered_here() -> None:
    elsewhere = {"max_tree_tokens", "vllm_engine_kwargs"}  # refused in training, a dictionary
    assert set(NEW_FIELDS) == {*OTHER, *ENGINE_WEIGHTS, *OF_SERVERS} | elsewhere


@pytest.mark.parametrize("name", NEW_FIELDS)
def test_help_describes_the_field(name: str) -> None:
    """It says what every choice does, and what `None` stands for."""
    field = NEW_FIELDS[name]
    text = field.metadata["help"]
    assert len(text) > 60
    assert [choice for choice in CHOICES.get(name, ()) if f"`{choice}`" not in text] == []
    if field.default is None:
        assert "Default: " in text


def test_defaults(tmp_path: Path) -> None:
    config = make(tmp_path)
    stock = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    for field in fields(GRPOConfig):
        if field.name not in ("logging_dir", "distributed_state", "deepspeed_plugin"):
            assert getattr(config, field.name) == getattr(stock, field.name), field.name
    assert config.segment_length == math.ceil(config.max_completion_length / 14)
    assert (config.branching_factor, config.branching_policy, config.branch_schedule) == (2, "uniform", "sqrt")
    assert (config.fallback_policy, config.stop_pattern) == ("none", None)
    assert (config.advantage_estimator, config.tree_packing) == ("optimal_baseline", "auto")


@pytest.mark.parametrize(
    ("value", "factor", "expected"),
    [
        (None, 2, [2, 2]),
        (None, 1, [8, 8]),  # no branching: independent completions
        (None, 3, [3, 3]),
        (5, 2, [5, 5]),
        ([3], 2, [3, 3]),
        ([2, 8], 2, [2, 8]),
        ((2, 4), 2, [2, 4]),
        ([1, 1], 2, [1, 1]),
    ],
)
def test_initial_branching_factor(tmp_path: Path, value: Any, factor: int, expected: list[int]) -> None:
    config = make(tmp_path, initial_branching_factor=value, branching_factor=factor, branch_schedule="early")
    assert config.first_width == expected


@pytest.mark.parametrize(
    ("weighting", "estimator", "expected"),
    [
        ("auto", "optimal_baseline", True),
        ("auto", "leave_one_out", True),
        ("auto", "treepo", False),
        ("uniform", "optimal_baseline", False),
        ("inverse_branching", "treepo", True),
    ],
)
def test_exact_estimators_weight_leaves_by_themselves(
    tmp_path: Path, weighting: str, estimator: str, expected: bool
) -> None:
    config = make(tmp_path, leaf_weighting=weighting, advantage_estimator=estimator)
    assert config.weights_leaves is expected


@pytest.mark.parametrize(
    ("length", "segment", "depth"),
    [(7168, 512, 14), (256, None, 14), (10, 3, 4), (10, 10, 1), (1, None, 1), (13, None, 13)],
)
def test_max_tree_depth(tmp_path: Path, length: int, segment: int | None, depth: int) -> None:
    config = make(tmp_path, max_completion_length=length, segment_length=segment)
    assert config.max_tree_depth == depth
    assert config.segment_length * config.max_tree_depth >= length


@pytest.mark.parametrize("estimator", CHOICES["advantage_estimator"])
def test_rejection_is_refused_where_it_changes_nothing(tmp_path: Path, estimator: str) -> None:
    """Two subgroups of two leaves: the rewards of one are equal."""
    rewards, ancestors = torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.tensor([[[0, 2], [0, 3], [1, 4], [1, 5]]])
    plain, rejected = (
        tree_advantages(rewards, ancestors, estimator, subgroup_rejection=rejection) for rejection in (False, True)
    )
    if torch.equal(plain, rejected):
        with pytest.raises(ValueError, match=f"`subgroup_rejection=True`.*{estimator}"):
            make(tmp_path, advantage_estimator=estimator, subgroup_rejection=True)
    else:
        assert make(tmp_path, advantage_estimator=estimator, subgroup_rejection=True).subgroup_rejection


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_answered_with_all_choices(tmp_path: Path, name: str) -> None:
    choices = ", ".join(map(repr, CHOICES[name]))
    with pytest.raises(ValueError, match=re.escape(f"`{name}` is 'nonsense'. Choose one of {choices}.")):
        make(tmp_path, **{name: "nonsense"})


@pytest.mark.parametrize("name", [name for name, choices in CHOICES.items() if "off" in choices])
def test_off_may_be_written_without_quotes_in_yaml(tmp_path: Path, name: str) -> None:
    assert getattr(make(tmp_path, **{name: yaml.safe_load("off")}), name) == "off"


def test_groups_may_not_be_split_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with 4 rows each hold one group of 8 between them: right for GRPO, not for a tree."""
    monkeypatch.setattr(GRPOConfig, "world_size", property(lambda self: 2))
    GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=8)
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size` \(4\) x `steps_per_generation` \(1\) = 4 .*"
                       r"`num_generations` \(8\).*Change one of the three"):  # fmt: skip
        make(tmp_path, per_device_train_batch_size=4, num_generations=8)
    assert make(tmp_path, per_device_train_batch_size=4, num_generations=4).generation_batch_size == 8
    assert make(tmp_path, per_device_train_batch_size=4, steps_per_generation=2).generation_batch_size == 16
    assert make(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4).steps_per_generation == 4
    assert make(tmp_path, per_device_train_batch_size=4, generation_batch_size=16).steps_per_generation == 2
    with pytest.raises(ValueError, match="split over processes"):
        make(tmp_path, per_device_train_batch_size=4, generation_batch_size=24, num_generations=8)


def test_trl_checks_still_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 generations"):
        make(tmp_path, num_generations=1, branching_factor=1)
    with pytest.raises(ValueError, match="divisible by num_generations"):
        make(tmp_path, num_generations=5)


def assert_parses(folder: Path, arguments: list[str], in_file: dict[str, Any], expected: dict[str, Any]) -> None:
    """What the command line and a YAML file say is what the config holds."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder), "use_cpu": True, "bf16": False, **in_file}))
    parser = TrlParser(TreePOConfig)
    (config,) = parser.parse_args_and_config(["--config", str(file), *arguments], fail_with_unknown_args=True)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("values", [OTHER, {**LORA_ENGINE, **ENGINE_WEIGHTS}], ids=["values", "lora-engine"])
def test_command_line(tmp_path: Path, values: dict[str, Any]) -> None:
    pairs = [(f"--{name}", *map(str, value if isinstance(value, list) else [value])) for name, value in values.items()]
    assert_parses(tmp_path, [word for pair in pairs for word in pair], {}, values)


@pytest.mark.parametrize(("initial", "expected"), [(4, [4, 4]), ([2, 8], [2, 8]), ([3], [3, 3])])
def test_yaml(tmp_path: Path, initial: Any, expected: list[int]) -> None:
    values = {**OTHER, "initial_branching_factor": initial}
    assert_parses(tmp_path, [], values, {**values, "initial_branching_factor": expected})


def test_arguments_of_the_engine_are_a_dictionary_on_the_command_line(tmp_path: Path) -> None:
    options = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    arguments = ["--vllm_engine_kwargs", json.dumps(options)]
    assert_parses(tmp_path, arguments, {}, {"vllm_engine_kwargs": options})
    assert_parses(tmp_path, [], {"vllm_engine_kwargs": options}, {"vllm_engine_kwargs": options})


def test_settings_of_servers_are_taken(tmp_path: Path) -> None:
    settings = {**SERVERS, **OF_SERVERS, "vllm_server_base_url": "http://a:1,http://b:1"}
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert_parses(tmp_path, arguments, {}, settings)
    assert_parses(tmp_path, [], settings, settings)


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    arguments = ["--segment_length", "64", "--initial_branching_factor", "3", "4"]
    assert_parses(tmp_path, arguments, OTHER, {**OTHER, "segment_length": 64, "initial_branching_factor": [3, 4]})


def test_to_dict_is_json_and_makes_the_same_config(tmp_path: Path) -> None:
    config = make(tmp_path, **OTHER)
    read = json.loads(json.dumps(config.to_dict()))
    for name, value in OTHER.items():
        assert read[name] == value
    again = make(tmp_path, **{name: read[name] for name in NEW_FIELDS})
    assert {name: getattr(again, name) for name in NEW_FIELDS} == {name: getattr(config, name) for name in NEW_FIELDS}
    assert json.loads(config.to_json_string())["segment_length"] == 32
    config.to_sanitized_dict()


def test_shipped_recipes_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file in examples/cli_configs has only known keys."""
    known = {f.name for f in fields(TreePOConfig)}
    files = sorted((ROOT / "examples/cli_configs").glob("*.yaml"))
    assert files
    for file in files:
        values = yaml.safe_load(file.read_text())
        assert set(values) & set(NEW_FIELDS), file
        ours = {k: v for k, v in values.items() if k in known}
        ours |= {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None, "report_to": []}
        monkeypatch.setenv("WORLD_SIZE", "1")
        TreePOConfig(**ours)
