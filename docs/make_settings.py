"""
Write `docs/settings.md`: every setting and option, from the `help` of its field.

    python docs/make_settings.py

A setting is described in the code and nowhere else. This file holds only their order and what stands between them.
"""

import copy
import dataclasses
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import GRPOConfig
from trl.scripts.grpo import GRPOScriptArguments

from treepo_trl import TreePOConfig, TreeSamplingConfig
from treepo_trl.apps.export.command import ExportArguments
from treepo_trl.command_line.arguments import PlanArguments, SampleArguments, TreePOScriptArguments
from treepo_trl.command_line.engine import EngineArguments
from treepo_trl.engines import SamplingOptions


PAGE = Path(__file__).with_name("settings.md")

OPENING = """\
<!-- Made by `make docs` from the fields' help texts in the code. Change them there. -->

# Settings

A setting is a field of `TreePOConfig`.
Give it by name: in Python, in a YAML file (`--config`), or as an option of `treepo-trl train`.
All settings of TRL's [`GRPOConfig`](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig) stay, and this page
has those that trees add.
`TreeSamplingConfig` and `treepo-trl sample` have the ones about trees and paths.
Most need no change, so start with eight.
[Choosing settings](choosing-settings.md#where-to-start) has values for them.

## The eight that matter first

1. [`num_generations`](#num_generations) says how many completions of a prompt are compared, and what a prompt costs.
2. [`segment_length`](#segment_length) says where a tree can branch. If a segment is as long as a completion, no prefix
   is shared but the prompt.
3. [`stop_pattern`](#stop_pattern) ends a path at its answer. Without it, paths go on over tokens that no reward reads.
4. [`branch_schedule`](#branch_schedule) says when a tree branches. The default has little noise per token.
5. [`advantage_estimator`](#advantage_estimator) says what a completion, or each of its segments, is compared with.
6. `use_vllm` is TRL's, and says how fast trees are sampled. Set it with `vllm_mode="colocate"`. With LoRA the adapter
   alone then travels to the engine ([`vllm_lora_sync`](#vllm_lora_sync)).
7. [`dynamic_sampling_rounds`](#dynamic_sampling_rounds) replaces prompts that teach nothing, because their completions
   all have the same reward.
8. [`max_tokens_per_micro_batch`](#max_tokens_per_micro_batch) bounds the memory of the update, whatever the trees look
   like.
"""

THEMES: dict[str, tuple[str, ...]] = {
    "Size of a tree": (
        "num_generations",
        "max_completion_length",
        "segment_length",
        "branching_factor",
        "initial_branching_factor",
    ),
    "Where and when a tree branches": (
        "branching_policy",
        "branching_temperature",
        "branching_temperature_end",
        "branch_schedule",
        "expected_completion_length",
    ),
    "Leaves that are missing, tokens that are left": ("fallback_policy", "fallback_candidates", "max_tree_tokens"),
    "Where a path ends": ("stop_pattern", "stop_repetition"),
    "From rewards to advantages": (
        "advantage_estimator",
        "subgroup_rejection",
        "leaf_weighting",
        "dynamic_sampling_rounds",
        "prompt_selection",
    ),
    "The update": ("tree_packing", "max_tokens_per_micro_batch"),
    "The engine of an adapter": (
        "vllm_lora_sync",
        "vllm_base_weights",
        "vllm_share_base_weights",
        "vllm_sleep_keeps_weights",
        "vllm_server_adapter_dir",
    ),
    "The vLLM engine": ("rollout_ahead", "engine_check", "vllm_engine_kwargs"),
    "Reward functions": ("reward_timeout",),
    "Tools and environments": ("tool_workers", "tool_timeout", "max_tool_answer_tokens", "environment_forking"),
    "Logs": ("log_trees",),
}

OPTIONS = """\
## Options of the commands

What the commands take beside the settings. `treepo-trl COMMAND --help` prints the same texts.
"""

_TYPES: dict[object, str] = {
    bool: "`true` or `false`",
    int: "whole number",
    float: "number",
    str: "text",
    dict: "JSON object",
    list[int]: "whole numbers",
    list[str]: "texts",
}


def settings_page() -> str:
    """
    The text of `docs/settings.md`.

    Raises:
        ValueError: if a setting is in no theme, or a theme has what is no setting.
    """
    trl_fields = {field.name for field in fields(GRPOConfig)}
    tree_fields = {field.name for field in fields(TreeSamplingConfig)}
    settings = {f.name: f for f in fields(TreePOConfig) if f.name in tree_fields or f.name not in trl_fields}
    listed = {name for names in THEMES.values() for name in names}
    if listed != set(settings):
        raise ValueError(f"Add to or remove from THEMES in {__file__}: {', '.join(sorted(listed ^ set(settings)))}.")
    parts = [OPENING]
    for theme, names in THEMES.items():
        parts += [f"## {theme}\n", *(_setting(settings[name]) for name in names)]
    of_trl = {field.name: field for field in fields(GRPOScriptArguments)}
    ours = [f for f in fields(TreePOScriptArguments) if f.name not in of_trl or f.metadata != of_trl[f.name].metadata]
    parts += [
        OPTIONS,
        _options("Data and rewards of `treepo-trl train` and `plan`", ours),
        _options("The card of `treepo-trl plan`", fields(PlanArguments)),
        _options("Prompts and trees of `treepo-trl sample`", fields(SampleArguments)),
        _options("Model and engine of `treepo-trl sample`", fields(EngineArguments)),
        _options("How `treepo-trl sample` draws a token", fields(SamplingOptions)),
        _options("What `treepo-trl export` reads and writes", fields(ExportArguments)),
    ]
    return "\n".join(parts)


def fields(settings: type) -> list[Field[Any]]:
    """The fields of a dataclass with the types that it declares; a parser narrows those of its fields for itself."""
    types_declared = get_type_hints(settings)
    copies = [copy.copy(field) for field in dataclasses.fields(settings)]
    for field in copies:
        field.type = types_declared[field.name]
    return copies


def _setting(field: Field[Any]) -> str:
    return f"### `{field.name}`\n\n*{_value(field)}*\n\n{_help(field)}\n"


def _options(title: str, options: Iterable[Field[Any]]) -> str:
    return "\n".join([f"### {title}\n", *(f"- `--{f.name}` (*{_value(f)}*): {_help(f)}" for f in options), ""])


def _help(field: Field[Any]) -> str:
    return field.metadata["help"].replace("%%", "%")


def _value(field: Field[Any]) -> str:
    """What a field holds and its default, such as "whole number, default `8`"."""
    if field.default in (None, MISSING):
        return f"{_type(field.type)}, optional"
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"{_type(field.type)}, default `{default}`"


def _type(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (types.UnionType, Union):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        return _type(dict if dict in kinds else kinds[0])
    return _TYPES[annotation]


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
