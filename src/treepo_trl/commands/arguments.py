"""The options of the commands, and the parser that reads them from flags and from `--config`."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from treepo_trl.field_checks import check_choice, check_int


TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
"""Rewards of TRL that `--reward_funcs` knows by name."""


@dataclass
class TreePOScriptArguments(GRPOScriptArguments):
    """Data and rewards of a training. Those of TRL's GRPO script, with more kinds of data."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data to train on: a dataset of the hub, a file (json, jsonl, csv, parquet or txt), or a folder "
            "written by `Dataset.save_to_disk`. Ignored if the config file has `datasets`."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Reward functions: {', '.join(TRL_REWARDS)}, or import paths such as "
            "my_package.rewards.my_reward. get_soft_overlong_punishment takes its lengths from the training: it "
            "punishes the last `segment_length` of `max_completion_length` tokens (the paper: the last 512 of 7168). "
            "In TRL's script these lengths are always 256 and 1280."
        },
    )


@dataclass
class PlanArguments:
    """What `treepo-trl plan` takes beside the arguments of the training."""

    card_gib: float | None = field(
        default=None, metadata={"help": "Memory of the GPU in GiB; that of this machine's first GPU by default."}
    )


@dataclass
class SampleArguments:
    """What `treepo-trl sample` reads, writes and compares."""

    dataset_name: str = field(
        default="-",
        metadata={
            "help": "Prompts: a dataset of the hub, a file (json, jsonl, csv, parquet or txt), a folder written by "
            "`Dataset.save_to_disk`, or - for standard input with a prompt per line."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to take the prompts from."})
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the prompts, text or messages; the key in JSON on standard input. Default: `prompt`, "
            "or the only column."
        },
    )
    max_prompts: int | None = field(
        default=None, metadata={"help": "Number of prompts, from the first on. Default: all."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the chat template, as in `GRPOConfig`; JSON on the command line, such as "
            """'{"enable_thinking": false}'."""
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSONL file for the trees. Each is written as soon as it is done, and a missing folder is made. "
            "Default: none; the first prompt's completions are printed."
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "Keep the trees that the output file holds, and sample the others."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of branching and of the engine."})
    compare: Literal["independent"] | None = field(
        default=None,
        metadata={"help": "Sample as many ordinary completions (`independent`) too, and print the ratios."},
    )
    repeats: int = field(
        default=3,
        metadata={
            "help": "With --compare: how often to sample both, in turn, after a warm-up. The table has the medians."
        },
    )

    def __post_init__(self) -> None:
        check_int("repeats", self.repeats)
        if self.repeats < 1:
            raise ValueError(f"`repeats` is {self.repeats}; it must be at least 1.")
        if self.max_prompts is not None:
            check_int("max_prompts", self.max_prompts)
            if self.max_prompts < 1:
                raise ValueError(f"`max_prompts` is {self.max_prompts}; it must be at least 1.")
        if self.compare is not None:
            check_choice("compare", self.compare, Literal["independent"])
            if self.resume:
                raise ValueError("`--compare` times all prompts and `--resume` leaves some out. Choose one of them.")
        if isinstance(self.chat_template_kwargs, str):
            with suppress(json.JSONDecodeError):
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(
                f"`chat_template_kwargs` is {self.chat_template_kwargs!r}; give a JSON object such as "
                """'{"enable_thinking": false}'."""
            )


def require_model(name: str | None) -> str:
    """
    The name or folder of the model.

    Raises:
        ValueError: if none is given.
    """
    if not name:
        raise ValueError("No model: give `--model_name_or_path` (hub id or folder).")
    return name


def options_parser(prog: str | None, *dataclasses: type) -> TrlParser:
    """Parser of dataclasses of options; it gives one value of each, in this order."""
    dataclass_types: Any = dataclasses  # TRL's own type for them is no class
    return TrlParser(dataclass_types, prog=prog)


def make_parser(prog: str | None = None, *more: type) -> TrlParser:
    """Parser for the script arguments, [`TreePOConfig`], TRL's model and dataset arguments, and `more` dataclasses."""
    from trl import DatasetMixtureConfig, ModelConfig

    from treepo_trl.treepo_config import TreePOConfig

    return options_parser(prog, TreePOScriptArguments, TreePOConfig, ModelConfig, DatasetMixtureConfig, *more)
