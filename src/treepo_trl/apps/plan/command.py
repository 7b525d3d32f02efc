"""`treepo-trl plan`: what a training would take of one GPU's memory. Loads no weights."""

from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig
from trl import ModelConfig

from treepo_trl.apps.train.adapter import starting_adapter
from treepo_trl.command_line.arguments import OptionsParser, PlanArguments, make_parser
from treepo_trl.command_line.errors import user_errors
from treepo_trl.memory import GIB, MemoryPlan, plan_memory
from treepo_trl.preflight import require_model
from treepo_trl.treepo_config import TreePOConfig


if TYPE_CHECKING:
    from peft import PeftConfig


def command_parser() -> OptionsParser:
    """The options of `treepo-trl plan`."""
    return make_parser("plan", PlanArguments)


def main(argv: list[str]) -> None:
    """
    Run the command with the arguments after `treepo-trl plan`.

    Exits with 1 and the reasons if the training does not fit. Needs no GPU if `--card_gib` says how large it is.
    """
    if not torch.cuda.is_available():  # what the training would check on a machine that has one
        argv = [*argv, "--use_cpu", "true", "--bf16", "false"]
    with user_errors():
        script_args, training_args, model_args, _, plan_args = command_parser().parse_args_and_config(argv)
        card = this_card() if plan_args.card_gib is None else plan_args.card_gib * GIB
        result = plan_training(training_args, model_args, card, starting_adapter(script_args, model_args))
    print(result.table())
    problems = result.problems()
    print("\n".join(problems) if problems else "It fits.")
    if problems:
        raise SystemExit(1)


def this_card() -> float:
    """
    Bytes of this machine's first GPU.

    Raises:
        ValueError: if there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("This machine has no GPU. Say how large the card is: `--card_gib 24`.")
    return float(torch.cuda.get_device_properties(0).total_memory)


def plan_training(
    training_args: TreePOConfig, model_args: ModelConfig, card: float, adapter: "PeftConfig | None" = None
) -> MemoryPlan:
    """
    What a training takes of a card of `card` bytes. Reads the config of the model. `adapter` is one to go on from.

    Raises:
        ValueError: if no model is given, and as [`~treepo_trl.memory.plan_memory`] does. `OSError` if there is no such
            model.
    """
    config = AutoConfig.from_pretrained(
        require_model(model_args.model_name_or_path),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    return plan_memory(config, training_args, model_args, card, adapter)


def no_share(error: Exception) -> ValueError:
    """The error about an engine whose share of the card is to be planned, where planning has failed so."""
    return ValueError(
        f"`vllm_gpu_memory_utilization='auto'`, but this training cannot be planned: {error} Give a number "
        "above 0 and up to 1."
    )
