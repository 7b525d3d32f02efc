"""The options of the commands, and the parser that reads them from flags and from `--config`."""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from trl import TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from treepo_trl.engines import SamplingOptions
from treepo_trl.preflight.config_file import check_options, config_of, split_words
from treepo_trl.preflight.option_table import DefaultsFormatter, OneLineParser
from treepo_trl.settings import Ranges, check_fields, check_text

from .examples import EXAMPLES


CONFIG_HELP = "YAML file with a setting per line, as `name: value`. An option on the command line overrides it."


def help_of(owner: type, name: str) -> dict[str, str]:
    """Metadata of a field with the help of another dataclass's: an option is described once for all commands."""
    return {"help": owner.__dataclass_fields__[name].metadata["help"]}


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

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "LoRA adapter to go on from, of the hub or a folder, such as one of TRL's `SFTTrainer`. Rank and "
            "target modules are its own, and so is the model without `model_name_or_path`. With `beta` the reference "
            "is the policy at the start, adapter included. Default: none; `use_peft` trains a new adapter."
        },
    )
    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tools that the model may call, as `module:function`. A function needs type hints and a docstring "
            "with a line for each argument."
        },
    )
    environment: str | None = field(
        default=None,
        metadata={
            "help": "Environment of each completion, as `module:Class`. With a `get_reward` it needs no reward "
            "function, and with `max_steps` no dataset."
        },
    )

    def __post_init__(self) -> None:
        rewards, tools = cast("tuple[object, object]", (self.reward_funcs, self.tools))
        self.reward_funcs = [rewards] if isinstance(rewards, str) else self.reward_funcs  # in a file one needs no list
        self.tools = [tools] if isinstance(tools, str) else self.tools
        if self.adapter_name_or_path is not None:
            check_text("adapter_name_or_path", self.adapter_name_or_path)
        for option, names in (("reward_funcs", self.reward_funcs), ("tools", self.tools)):
            for name in names or []:
                check_text(option, name)


@dataclass
class PlanArguments:
    """What `treepo-trl plan` takes beside the arguments of the training."""

    card_gib: float | None = field(
        default=None, metadata={"help": "Memory of the GPU in GiB; that of this machine's first GPU by default."}
    )

    def __post_init__(self) -> None:
        check_fields(self, PlanArguments, {"card_gib": (lambda value: value > 0, "above 0")})


_SAMPLE_RANGES: Ranges = {
    "repeats": (lambda value: value >= 1, "at least 1"),
    "max_prompts": (lambda value: value >= 1, "at least 1"),
}


@dataclass
class SampleArguments:
    """What `treepo-trl sample` reads, writes and compares."""

    dataset_name: str = field(
        default="-",
        metadata={
            "help": "Where prompts come from: a dataset of the hub, a file (json, jsonl, csv, parquet or txt), or a "
            "folder written by `Dataset.save_to_disk`. - is standard input, with a prompt per line."
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
    resume: bool = field(default=False, metadata={"help": "Keep what `output` holds, and sample the rest."})
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
        check_fields(self, SampleArguments, _SAMPLE_RANGES)
        if self.resume and self.compare is not None:
            raise ValueError("`--compare` times all prompts and `--resume` leaves some out. Choose one of them.")
        if self.resume and self.output is None:
            raise ValueError(
                "`--resume` goes on from the trees in a file: give it as `--output`, or unset `--resume`."
            )
        self.chat_template_kwargs = json_object(
            "chat_template_kwargs", self.chat_template_kwargs, '{"enable_thinking": false}'
        )


def json_object(option: str, value: dict | str | None, example: str) -> dict | None:
    """
    A mapping that the command line gives as JSON and a file as it is.

    Raises:
        ValueError: if it is none, with an example.
    """
    parsed: object = value
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            parsed = json.loads(value)
    if not isinstance(parsed, dict | None):
        raise ValueError(f"`{option}` is {parsed!r}; give a JSON object such as '{example}'.")
    return parsed


# Options of TRL's dataclasses that commands without a trainer have too: described by the latter's.
_DESCRIBED_BY: dict[str, type] = dict.fromkeys(SamplingOptions.__dataclass_fields__, SamplingOptions)
_DESCRIBED_BY["chat_template_kwargs"] = SampleArguments


class OptionsParser(OneLineParser, TrlParser):
    """TRL's parser of options and of the file of `--config`, whose errors are one line."""

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:  # parameters as in TRL
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        # TRL takes it out of the arguments by its full name: here for `--help` and shells.
        self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=CONFIG_HELP)
        for action in self._actions:
            owner = _DESCRIBED_BY.get(action.dest)
            if owner is not None:
                action.help = help_of(owner, action.dest)["help"]

    def parse_args_and_config(  # parameters as in TRL
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """
        The dataclasses of options.

        Raises:
            ValueError: for unknown options, values out of range, and a file that holds no settings. `TypeError` for
                values of another type.
        """
        words = split_words(sys.argv[1:] if args is None else args)
        config_of(self, words)
        if fail_with_unknown_args and not return_remaining_strings:
            check_options(self, words)
        try:
            return super().parse_args_and_config(
                words, return_remaining_strings, fail_with_unknown_args, separate_remaining_strings
            )
        except AttributeError as error:  # transformers takes the types of some values for granted
            raise TypeError(f"{error.obj!r} is of a wrong type for its setting: {error}.") from error


def options_parser(command: str | None, *dataclasses: type) -> OptionsParser:
    """Parser of dataclasses of options for a command; it gives one value of each, in this order."""
    dataclass_types: Any = dataclasses  # TRL's own type for them is no class
    if command is None:
        return OptionsParser(dataclass_types)
    prog = f"treepo-trl {command}"
    return OptionsParser(
        dataclass_types,
        prog=prog,
        usage=f"{prog} [--config FILE] [options]",  # argparse's own names all of several hundred
        description=EXAMPLES[command],
        formatter_class=DefaultsFormatter,
    )


def make_parser(command: str | None = None, *more: type) -> OptionsParser:
    """Parser for the script arguments, [`TreePOConfig`], TRL's model and dataset arguments, and `more` dataclasses."""
    from trl import DatasetMixtureConfig, ModelConfig

    from treepo_trl.treepo_config import TreePOConfig

    parser = options_parser(command, TreePOScriptArguments, TreePOConfig, ModelConfig, DatasetMixtureConfig, *more)
    for action in parser._actions:
        if action.dest == "vllm_gpu_memory_utilization":  # of a number or text the parser takes the number alone
            action.type = _number_or_auto
    return parser


def _number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)
