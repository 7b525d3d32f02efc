"""`treepo-trl doctor`: the environment as a table, and checks whether a training works here."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import yaml
from transformers import AutoTokenizer
from trl import ModelConfig

from treepo_trl.doctor.examination import check_memory, examine
from treepo_trl.doctor.findings import CannotRunError, Check, in_words
from treepo_trl.doctor.needs import Needs, NumberType, everything, of_recipe
from treepo_trl.doctor.servers import check_servers
from treepo_trl.doctor.settings import check_settings
from treepo_trl.memory import GIB, NotPlannedError
from treepo_trl.policy.servers.checks import ServerNeeds
from treepo_trl.policy.servers.weights import AdapterVersions
from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.preflight import check_config, require_model
from treepo_trl.quickstart import small_model
from treepo_trl.quickstart.model import default_folder
from treepo_trl.settings import server_urls
from treepo_trl.treepo_config import TreePOConfig

from .arguments import CONFIG_HELP, PlanArguments, help_of, make_parser
from .errors import user_errors
from .examples import EXAMPLES
from .plan import no_share, plan_training
from .train_adapter import starting_adapter


if TYPE_CHECKING:
    from peft import PeftConfig


_DESCRIPTION = """\
Checks whether training works on this machine, and says what to change where it does not.
With --config it checks what that recipe needs and no more; further options are those of `treepo-trl train`.
With --config R --model_name_or_path M it plans R's model, and runs the checks on M.
The exit status is 1 if something is broken."""


class Recipe(NamedTuple):
    """What a recipe needs, and its checks for which none of the child processes is needed: none without a recipe."""

    needs: Needs
    memory: Check | None = None
    servers: Check | None = None
    settings: Check | None = None


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl doctor`; exits with 1 if something is broken."""
    with user_errors():
        own, rest = _parsed(argv)
        model = require_model(own.model_name_or_path) if own.model_name_or_path else small_model(default_folder())
        recipe = _recipe(rest, model) if rest else Recipe(everything(model))
    report = examine(*recipe)
    print(json.dumps(report.to_dict(), indent=2) if own.json else report.text())
    if report.exit_status:
        raise SystemExit(report.exit_status)


def command_parser() -> argparse.ArgumentParser:
    """The options of `treepo-trl doctor`: its own, and those of the training that a recipe is for."""
    parents = [make_parser("doctor", PlanArguments), help_parser()]
    return argparse.ArgumentParser("treepo-trl doctor", parents=parents, add_help=False, conflict_handler="resolve")


def help_parser() -> argparse.ArgumentParser:
    """The options of `treepo-trl doctor` that `--help` shows: without those of a training, which recipes have."""
    parser = argparse.ArgumentParser(
        "treepo-trl doctor",
        description=f"{EXAMPLES['doctor']}\n{_DESCRIPTION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--model_name_or_path", type=str, metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="Print JSON, to attach to an issue.")
    parser.add_argument("--card_gib", type=float, metavar="GIB", help=help_of(PlanArguments, "card_gib")["help"])
    return parser


def _parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and those of the training."""
    parser = help_parser()
    if any(word in ("-h", "--help") for word in argv):
        parser.parse_args(argv)
    if "--config" in argv and not [word for word in argv[argv.index("--config") + 1 :][:1] if word[:2] != "--"]:
        make_parser("doctor").error("argument --config: expected one argument")
    own, rest = parser.parse_known_args(argv)
    if own.config is not None:
        rest += ["--config", own.config]
    if own.card_gib is not None:
        if not rest:
            raise ValueError("`--card_gib` is for the plan of a recipe. Add `--config`, or leave it out.")
        rest += ["--card_gib", str(own.card_gib)]
    return own, rest


_MODEL_HELP = "Folder or hub name of the model that the checks run on. Default: SmolLM2-135M-Instruct, from a package."


def _recipe(argv: list[str], model: str) -> Recipe:
    """What a recipe needs, and its checks; that of servers if it has some."""
    number_type, use_cpu = _number_type(argv)
    on_cpu = use_cpu or not torch.cuda.is_available()
    # A number type that does not work here would be refused now; that it does not is a finding.
    readable = [*argv, "--bf16", "false", "--fp16", "false", *(["--use_cpu", "true"] if on_cpu else [])]
    parser = make_parser("doctor", PlanArguments)
    try:
        parsed = parser.parse_args_and_config(readable)
    except RuntimeError:  # of a card that no process can use: rows and checks say so, and the recipe is read without
        parsed = parser.parse_args_and_config([*readable, "--use_cpu", "true"])
    script_args, training_args, model_args, _, plan_args = parsed
    adapter = starting_adapter(script_args, model_args)
    model_args.model_name_or_path = model_args.model_name_or_path or model

    def plan(card: float) -> tuple[list[str], float]:
        try:
            planned = plan_training(training_args, model_args, card, adapter)
        except NotPlannedError as error:
            if training_args.vllm_gpu_memory_utilization != "auto":
                raise
            raise no_share(error) from error
        return planned.problems(), max(planned.rollout, planned.update)

    checked_args = model_args if adapter is None else _with_new_adapter(model_args, adapter)
    needs = of_recipe(model, training_args, checked_args, number_type, use_cpu)
    servers = partial(_check_servers, training_args, model_args, adapter) if needs.has_servers else None
    memory = partial(_check_memory, plan, plan_args.card_gib, on_cpu)
    turns = script_args.tools, script_args.environment
    return Recipe(needs, memory, servers, partial(check_settings, training_args, model_args, adapter, *turns))


def _check_memory(plan: Callable[[float], tuple[list[str], float]], card_gib: float | None, on_cpu: bool) -> str:
    """Check whether a recipe fits the card that is named, or the one that is here."""
    if card_gib is not None or on_cpu:
        return check_memory(plan, None if card_gib is None else card_gib * GIB, None)
    try:
        free, card = map(float, torch.cuda.mem_get_info(0))
    except RuntimeError as error:
        raise CannotRunError(f"the card's memory cannot be read: {in_words(error)}") from error
    return check_memory(plan, card, free)


def _check_servers(training_args: TreePOConfig, model_args: ModelConfig, adapter: "PeftConfig | None") -> str:
    """Check the servers of a recipe against the policy that it would train."""
    adapter = adapter or new_adapter_config(model_args)
    has_adapter = adapter is not None and training_args.vllm_lora_sync == "adapter"
    needs = ServerNeeds(
        cast(str, model_args.model_name_or_path),
        AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision),
        training_args.vllm_max_model_length or training_args.max_completion_length + 1,
        training_args.branching_policy == "entropy",
        AdapterVersions.kept if has_adapter else 0,
        getattr(adapter, "r", 0) if has_adapter else 0,
        all_weights=not has_adapter,
    )
    urls = server_urls(
        training_args.vllm_server_base_url, training_args.vllm_server_host, training_args.vllm_server_port
    )
    return check_servers(urls, needs)


def _with_new_adapter(model_args: ModelConfig, adapter: "PeftConfig") -> ModelConfig:
    """The settings of a new adapter that is like a given one: the checks run on a model that this may not fit."""
    options = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    given: dict[str, Any] = {
        option: getattr(adapter, name) for option, name in options.items() if hasattr(adapter, name)
    }
    return replace(model_args, use_peft=True, **given)


def _number_type(argv: list[str]) -> tuple[NumberType, bool]:
    """What the training would compute in, and whether on the processor, by options or by the file of `--config`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ("bf16", "fp16", "use_cpu")
    for name in ("config", *names):
        parser.add_argument(f"--{name}", nargs="?", const="true")
    given = vars(parser.parse_known_args(argv)[0])
    file = {}
    if given["config"] is not None:
        check_config(given["config"])
        with open(given["config"]) as stream:
            file = yaml.safe_load(stream)
    bf16, fp16, use_cpu = (
        {"true": True, "false": False}.get(str(file.get(name) if given[name] is None else given[name]).lower())
        for name in names
    )
    if fp16 and bf16:
        raise ValueError("`fp16` and `bf16` are both true. Set one of them to false: a training computes in one type.")
    if fp16:
        return "float16", bool(use_cpu)
    return ("bfloat16" if bf16 is not False else "float32"), bool(use_cpu)  # TRL's default is bfloat16
