"""The command line: `treepo-trl train`, `treepo-trl plan` and `treepo-trl sample`."""

import argparse
import importlib
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from trl.scripts.grpo import GRPOScriptArguments

from . import __version__
from .commands.errors import user_errors
from .commands.prompts import load_named_dataset, take_split


@dataclass
class TreePOScriptArguments(GRPOScriptArguments):
    """
    Script arguments of the TreePO training script: those of TRL's GRPO script.

    `--dataset_name` also takes a local file (json, jsonl, csv, parquet or txt) or a folder written by
    `Dataset.save_to_disk`. The reward `get_soft_overlong_punishment` takes its lengths from the training:
    `max_completion_length`, of which the last `segment_length` tokens are punished (the paper: the last 512 of 7168);
    in TRL's script they are 1280 and 256 whatever the training.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: accuracy_reward, reasoning_accuracy_reward, think_format_reward, "
            "get_soft_overlong_punishment (of the last `segment_length` of `max_completion_length` tokens), or import "
            "paths such as my_package.rewards.my_reward.",
        },
    )


def load_reward_funcs(script_args: TreePOScriptArguments, training_args: Any) -> list[Any]:
    """
    Reward functions by TRL's names or by import path, after the reward model if there is one.

    Raises:
        ValueError: for a name that is neither, or when no reward is given at all.
    """
    from trl import rewards  # pyright: ignore

    registry = {
        "accuracy_reward": rewards.accuracy_reward,
        "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward,
        "think_format_reward": rewards.think_format_reward,
        "get_soft_overlong_punishment": rewards.get_soft_overlong_punishment(
            max_completion_len=training_args.max_completion_length, soft_punish_cache=training_args.segment_length
        ),
    }
    functions: list[Any] = []
    if script_args.reward_model_name_or_path:
        functions.append(script_args.reward_model_name_or_path)
    for name in script_args.reward_funcs or []:
        if name in registry:
            functions.append(registry[name])
            continue
        module_name, _, attribute = name.rpartition(".")
        if not module_name:
            raise ValueError(
                f"`--reward_funcs {name}` is no reward of TRL. Choose from {', '.join(registry)}, or give an import "
                "path such as `my_package.rewards.my_reward`."
            )
        if os.getcwd() not in sys.path:  # as in TRL's script: a module beside the run is found
            sys.path.insert(0, os.getcwd())
        try:
            functions.append(getattr(importlib.import_module(module_name), attribute))
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"`--reward_funcs {name}` could not be loaded: {error}. Check the path, and that {os.getcwd()} or the "
                "installed packages hold it."
            ) from error
    if not functions:
        raise ValueError(
            "No reward: give `--reward_funcs` (TRL's names or import paths) or `--reward_model_name_or_path`."
        )
    return functions


def load_train_and_test(script_args: TreePOScriptArguments, dataset_args: Any) -> Any:
    """
    The dataset splits from a mixture, a local file or folder, or the hub.

    Raises:
        ValueError: if no dataset is given, or the file's kind is unknown.
    """
    from trl import get_dataset

    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if not script_args.dataset_name:
        raise ValueError("No dataset: give `--dataset_name` (hub id, file or folder) or `datasets` in the config.")
    return load_named_dataset(
        script_args.dataset_name,
        script_args.dataset_config,
        script_args.dataset_train_split,
        script_args.dataset_streaming,
    )


def train(script_args: TreePOScriptArguments, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train as `trl grpo` does, with [`TreePOTrainer`]; saves the model to `training_args.output_dir`."""
    from trl import get_peft_config, get_quantization_config

    from .treepo_trainer import TreePOTrainer

    with user_errors():
        check_memory(training_args, model_args)
        reward_funcs = load_reward_funcs(script_args, training_args)
        dataset = load_train_and_test(script_args, dataset_args)
        train_dataset = take_split(dataset, script_args.dataset_train_split, "--dataset_train_split")
        eval_dataset = None
        if training_args.eval_strategy != "no":
            eval_dataset = take_split(dataset, script_args.dataset_test_split, "--dataset_test_split")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = TreePOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


@dataclass
class PlanArguments:
    """What `treepo-trl plan` takes beside the arguments of the training."""

    card_gib: float | None = field(
        default=None, metadata={"help": "Memory of the GPU in GiB; that of this machine's first GPU by default."}
    )


def make_parser(prog: str | None = None, *more: type) -> Any:
    """Parser for the script arguments, [`TreePOConfig`], TRL's model and dataset arguments, and `more` dataclasses."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from .treepo_config import TreePOConfig

    dataclass_types: Any = (TreePOScriptArguments, TreePOConfig, ModelConfig, DatasetMixtureConfig, *more)
    return TrlParser(dataclass_types, prog=prog)


def plan(argv: list[str]) -> None:
    """
    Print what a training takes of one GPU's memory; exit with 1 and the reasons if it does not fit.

    Loads no weights, and needs no GPU if `--card_gib` says how large it is.
    """
    import torch

    from .memory.plan import GIB

    if not torch.cuda.is_available():  # what the training would check on a machine that has one
        argv = [*argv, "--use_cpu", "true", "--bf16", "false"]
    with user_errors():
        parser = make_parser("treepo-trl plan", PlanArguments)
        _, training_args, model_args, _, plan_args = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
        if plan_args.card_gib is not None:
            card = plan_args.card_gib * GIB
        elif torch.cuda.is_available():
            card = float(torch.cuda.get_device_properties(0).total_memory)
        else:
            raise ValueError("This machine has no GPU. Say how large the card is: `--card_gib 24`.")
        result = _plan(training_args, model_args, card)
    print(result.table())
    problems = result.problems()
    print("\n".join(problems) if problems else "It fits.")
    if problems:
        raise SystemExit(1)


def _plan(training_args: Any, model_args: Any, card: float) -> Any:
    from transformers import AutoConfig

    from .memory.plan import plan_memory

    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    return plan_memory(config, training_args, model_args, card)


def check_memory(training_args: Any, model_args: Any) -> None:
    """
    Print the plan of a training on this machine's one GPU before anything is loaded.

    Says so where it cannot count: what it does not know must not stop a training.

    Raises:
        ValueError: if weights and gradients alone are more than the card has, with the settings to change.
    """
    import torch

    is_one_gpu = torch.cuda.is_available() and torch.cuda.device_count() == 1 and training_args.world_size == 1
    if not is_one_gpu or training_args.use_cpu or training_args.deepspeed or training_args.fsdp:
        return
    try:
        result = _plan(training_args, model_args, float(torch.cuda.get_device_properties(0).total_memory))
    except Exception as error:
        print(f"Memory is not planned for this training: {type(error).__name__}: {error}")
        return
    print(result.table())
    reason = result.impossible()
    if reason is not None:
        raise ValueError(reason)
    for problem in result.problems():
        print(f"May not fit: {problem}")


_USAGE = """usage: treepo-trl {train,plan,sample} [--config FILE] [options]

commands:
  train    fine-tune a model with TreePOTrainer
  plan     what a training would take of a GPU's memory
  sample   sample trees of completions without training

`treepo-trl COMMAND --help` lists a command's options."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `treepo-trl`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if argv[0] == "--version":
        print(f"treepo-trl {__version__}")
        return
    parser = argparse.ArgumentParser(prog="treepo-trl", usage=_USAGE.partition("\n")[0].removeprefix("usage: "))
    parser.add_argument("command", choices=["train", "plan", "sample"])
    command = parser.parse_args(argv[:1]).command
    if argv[-1] == "--config":  # TRL's parser takes the next argument without looking
        parser.error("argument --config: expected one argument")
    if command == "sample":
        from .commands.sample import main as sample

        sample(argv[1:])
        return
    if command == "plan":
        plan(argv[1:])
        return
    with user_errors():
        arguments = make_parser(prog="treepo-trl train").parse_args_and_config(argv[1:], fail_with_unknown_args=True)
    train(*arguments)


if __name__ == "__main__":
    main()
