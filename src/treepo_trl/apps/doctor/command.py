"""`treepo-trl doctor`: the environment as a table, and checks whether a training works here."""

import argparse
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from treepo_trl.commands.arguments import OptionsParser, PlanArguments, make_parser, options_parser
from treepo_trl.commands.errors import user_errors
from treepo_trl.commands.train_adapter import starting_adapter
from treepo_trl.preflight import check_config, check_options, require_model
from treepo_trl.preflight.config_file import config_of, split_words
from treepo_trl.quickstart import small_model
from treepo_trl.quickstart.model import default_folder

from .checks import check_memory, check_number_type, check_settings
from .child import run_step
from .environment import environment
from .findings import Check, Report, finding_of
from .recipe import Needs, NumberType, Recipe, everything, of_recipe
from .servers import check_servers
from .versions import check_versions


_DESCRIPTION = """\
Checks whether training works on this machine, and says what to change where it does not.
With --config it checks what that recipe needs and no more; further options are those of `treepo-trl train`.
With --config R --model_name_or_path M it plans R's model, and makes a small step of R on M.
The exit status is 1 if something is broken."""
_MODEL_HELP = "Folder or hub name of the model that the step is made on. Default: SmolLM2-135M-Instruct, of a package."


@dataclass
class DoctorArguments(PlanArguments):
    """What `treepo-trl doctor` takes beside the arguments of the training."""

    json: bool = field(default=False, metadata={"help": "Print JSON, to attach to an issue."})


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl doctor`; exits with 1 if something is broken."""
    with user_errors():
        needs, recipe, as_json = _read(argv)
    report = examine(needs, recipe)
    print(json.dumps(report.to_dict(), indent=2) if as_json else report.text())
    if report.exit_status:
        raise SystemExit(report.exit_status)


def command_parser() -> OptionsParser:
    """The options of `treepo-trl doctor`: its own, and those of the training that a recipe is for."""
    return make_parser("doctor", DoctorArguments)


def help_parser() -> argparse.ArgumentParser:
    """The options of `treepo-trl doctor` that `--help` shows: without those of a training, which recipes have."""
    parser = options_parser("doctor", DoctorArguments)
    parser.description = f"{parser.description}\n{_DESCRIPTION}"
    parser.add_argument("--model_name_or_path", metavar="MODEL", help=_MODEL_HELP)
    return parser


def examine(needs: Needs, recipe: Recipe | None = None) -> Report:
    """Environment and findings: packages first, then what stands on them."""
    checks: dict[str, tuple[Check, str]] = {"versions": (partial(check_versions, needs.packages), "")}
    if recipe is not None:
        checks["settings"] = partial(check_settings, recipe), "Look for this error in the issues of vLLM."
        checks["memory"] = partial(check_memory, recipe), "Give `--card_gib`, or name another model."
    if recipe is not None and needs.has_servers:
        checks["servers"] = partial(check_servers, recipe), "Start them as docs/servers.md says."
    checks["number type"] = partial(check_number_type, needs), "Name a number type (`bf16`, `fp16`)."
    report = Report(environment())
    sys.stderr.write(f"checking {', '.join(checks)} ...\n")
    report.findings += [finding_of(name, check, remedy) for name, (check, remedy) in checks.items()]
    sys.stderr.write("checking the engine and one small step ...\n")
    report.findings += run_step(needs)
    return report


def _read(argv: list[str]) -> tuple[Needs, Recipe | None, bool]:
    """What is to be checked, the recipe if one is given, and whether the report is to be JSON."""
    parser, words = command_parser(), split_words(argv)
    file = config_of(parser, words)
    in_file = {} if file is None else check_config(file)
    start = len(words) if file is None else words.index("--config")
    on_line = check_options(parser, words[:start] + words[start + 2 :])
    given = on_line.get("model_name_or_path")
    model = require_model(str(given)) if given else small_model(default_folder())
    as_json = bool(on_line.get("json"))
    if file is None and not on_line.keys() - {"model_name_or_path", "json", "card_gib"}:
        if "card_gib" in on_line:
            raise ValueError("`--card_gib` is for the plan of a recipe. Add `--config`, or leave it out.")
        return everything(model), None, as_json
    number_type, use_cpu = _number_type(in_file | on_line)
    on_cpu = use_cpu or not torch.cuda.is_available()
    script_args, training_args, model_args, _, own = _parsed(parser, words, on_cpu)
    model_args.model_name_or_path = in_file.get("model_name_or_path")  # the line's is what the step is made on
    adapter = starting_adapter(script_args, model_args)
    model_args.model_name_or_path = model_args.model_name_or_path or model
    turns = script_args.tools, script_args.environment
    recipe = Recipe(training_args, model_args, adapter, *turns, on_cpu, own.card_gib)
    return of_recipe(model, recipe, number_type, use_cpu), recipe, as_json


def _parsed(parser: OptionsParser, words: list[str], on_cpu: bool) -> tuple[Any, ...]:
    """The dataclasses of options, without a number type: one that does not work here is a finding, and no error."""
    readable = [*words, "--bf16", "false", "--fp16", "false"]
    without_card = [*readable, "--use_cpu", "true"]
    try:
        return parser.parse_args_and_config(without_card if on_cpu else readable)
    except RuntimeError:  # of a card that no process can use: rows and checks say so, and the recipe is read without
        return parser.parse_args_and_config(without_card)


def _number_type(given: dict[str, object]) -> tuple[NumberType, bool]:
    """What the training would compute in, and whether on the processor, by its settings as they were written."""
    bf16, fp16, use_cpu = (
        {"true": True, "false": False}.get(str(given.get(name)).lower()) for name in ("bf16", "fp16", "use_cpu")
    )
    if fp16 and bf16:
        raise ValueError("`fp16` and `bf16` are both true. Set one of them to false: a training computes in one type.")
    if fp16:
        return "float16", bool(use_cpu)
    return ("bfloat16" if bf16 is not False else "float32"), bool(use_cpu)  # TRL's default is bfloat16
