"""`treepo-trl doctor`: the environment as a table, and checks whether a training works here."""

import argparse
import json
import sys
from dataclasses import dataclass, field
from functools import partial

from treepo_trl.command_line.arguments import OptionsParser, PlanArguments, make_parser, options_parser
from treepo_trl.command_line.errors import user_errors
from treepo_trl.preflight import check_options
from treepo_trl.preflight.config_file import split_words

from .checks import check_memory, check_number_type, check_settings
from .child import run_step
from .environment import environment
from .findings import Check, Report, finding_of
from .recipe import Recipe, read
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
        parser = command_parser()
        as_json = check_options(parser, split_words(argv)).get("json")
        recipe = read(parser, argv)
    report = examine(recipe)
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


def examine(recipe: Recipe) -> Report:
    """Environment and findings: packages first, then what stands on them."""
    checks: dict[str, tuple[Check, str]] = {"versions": (partial(check_versions, recipe.packages), "")}
    if recipe.is_given:
        checks["settings"] = partial(check_settings, recipe), "Look for this error in the issues of vLLM."
        checks["memory"] = partial(check_memory, recipe), "Give `--card_gib`, or name another model."
    if recipe.has_servers:
        checks["servers"] = partial(check_servers, recipe), "Start them as docs/servers.md says."
    checks["number type"] = partial(check_number_type, recipe), "Name a number type (`bf16`, `fp16`)."
    report = Report(environment())
    sys.stderr.write(f"checking {', '.join(checks)} ...\n")
    report.findings += [finding_of(name, check, remedy) for name, (check, remedy) in checks.items()]
    sys.stderr.write("checking the engine and one small step ...\n")
    report.findings += run_step(recipe)
    return report
