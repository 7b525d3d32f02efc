"""`treepo-trl train`: a training as `trl grpo` runs it, with [`TreePOTrainer`]."""

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import ProgressCallback
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_quantization_config

from treepo_trl.apps.plan.command import no_share, plan_training, this_card
from treepo_trl.checkpoints import checkpoint_to_resume
from treepo_trl.command_line.arguments import TRL_REWARDS, OptionsParser, TreePOScriptArguments, make_parser
from treepo_trl.command_line.errors import user_errors
from treepo_trl.command_line.prompts import load_named_dataset, take_split
from treepo_trl.policy.starting_adapter import load_with_adapter, new_adapter_config
from treepo_trl.preflight import check_import_path, require_model
from treepo_trl.preflight.import_paths import could_not_load, find_beside_run
from treepo_trl.quickstart import TreeProgressCallback, lines_above_the_bar
from treepo_trl.sampling import TreeSamplingConfig
from treepo_trl.treepo_config import TreePOConfig

from .adapter import check_starting_adapter, load_tokenizer_of, starting_adapter


if TYPE_CHECKING:
    from peft import PeftConfig
    from trl.trainer.grpo_trainer import RewardFunc


def command_parser() -> OptionsParser:
    """The options of `treepo-trl train`."""
    return make_parser("train")


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl train`."""
    with user_errors():
        arguments = command_parser().parse_args_and_config(argv)
    train(*arguments)


def train(
    script_args: TreePOScriptArguments,
    training_args: TreePOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train, and save the model to `training_args.output_dir`."""
    from treepo_trl.treepo_trainer import TreePOTrainer

    with user_errors():
        adapter = starting_adapter(script_args, model_args)
        require_model(model_args.model_name_or_path)
        checkpoint = checkpoint_to_resume(
            _true_or_folder(training_args.resume_from_checkpoint), _output_dir(training_args)
        )
        check_memory(training_args, model_args, adapter)
        tools = [imported("--tools", name, ":") for name in script_args.tools or []]
        environment = imported("--environment", script_args.environment, ":") if script_args.environment else None
        reward_funcs = load_reward_funcs(script_args, training_args)
        train_dataset, eval_dataset = load_splits(script_args, training_args, dataset_args)
        trainer = TreePOTrainer(
            **policy_arguments(script_args, training_args, model_args, adapter),
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tools=tools,
            environment_factory=environment,
        )
    if trainer.pop_callback(ProgressCallback) is not None:  # not there with `disable_tqdm` and in notebooks
        trainer.add_callback(TreeProgressCallback)
    with lines_above_the_bar():
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # the logs, for `treepo-trl view --health`
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def policy_arguments(
    script_args: TreePOScriptArguments,
    training_args: TreePOConfig,
    model_args: ModelConfig,
    adapter: "PeftConfig | None",
) -> dict[str, Any]:
    """What [`TreePOTrainer`] gets of the policy: the name of a model, or one that is loaded with its adapter."""
    base = require_model(model_args.model_name_or_path)
    options = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast(dict[str, object], training_args.model_init_kwargs or {}),
    }
    training_args.model_init_kwargs = options
    quantization_config, name = get_quantization_config(model_args), script_args.adapter_name_or_path
    if adapter is None or name is None:
        return {
            "model": base,
            "quantization_config": quantization_config,
            "peft_config": new_adapter_config(model_args),
        }
    check_starting_adapter(name, adapter, training_args, model_args)
    tokenizer = load_tokenizer_of(name, training_args, model_args)
    model = load_with_adapter(base, name, training_args, options, quantization_config)
    if not script_args.reward_model_name_or_path:  # which TRL loads with them too
        training_args.model_init_kwargs = None  # TRL would warn that they are not used
    return {"model": model, "processing_class": tokenizer}


def _true_or_folder(resume: object) -> str | bool | None:
    """`resume_from_checkpoint` of a file, or of the command line, where every value is text."""
    return {"true": True, "false": False}.get(str(resume).lower(), cast("str | None", resume))


def _output_dir(training_args: TreePOConfig) -> str:
    """
    The folder, made if it is missing.

    Raises:
        ValueError: if it cannot be made.
    """
    folder = str(training_args.output_dir)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`--output_dir {folder}` cannot be made: {error.strerror}. Name another folder.") from error
    return folder


def check_memory(training_args: TreePOConfig, model_args: ModelConfig, adapter: "PeftConfig | None" = None) -> None:
    """
    Print the plan of a training on this machine's one GPU before anything is loaded; set vLLM's share if it is `auto`.

    A model that cannot be counted is trained all the same, after a line that says why it was not counted.

    Raises:
        ValueError: if weights and gradients alone are more than the card has, with the settings to change. With
            `vllm_gpu_memory_utilization="auto"` also if the training does not fit, or cannot be planned.
    """
    is_planned = training_args.vllm_gpu_memory_utilization == "auto"
    is_one_gpu = torch.cuda.is_available() and torch.cuda.device_count() == 1 and training_args.world_size == 1
    if not is_one_gpu or training_args.use_cpu or training_args.deepspeed or training_args.fsdp:
        if is_planned:
            raise ValueError(
                "`vllm_gpu_memory_utilization='auto'` is planned for one GPU in one process, without DeepSpeed and "
                "FSDP. Give a number above 0 and up to 1."
            )
        return
    try:
        result = plan_training(training_args, model_args, this_card(), adapter)
    except Exception as error:
        if is_planned:
            raise no_share(error) from error
        print(f"Memory is not planned for this training: {type(error).__name__}: {error}")
        return
    print(result.table())
    reason = result.impossible()
    if reason is not None:
        raise ValueError(reason)
    problems = result.problems()
    if is_planned and problems:
        raise ValueError(" ".join(problems))
    for problem in problems:
        print(f"May not fit: {problem}")
    if is_planned:
        training_args.vllm_gpu_memory_utilization = result.share


def load_reward_funcs(script_args: TreePOScriptArguments, training_args: TreePOConfig) -> "list[RewardFunc]":
    """
    Reward functions by TRL's names or by import path, after the reward model if there is one.

    Raises:
        ValueError: for a name that is neither, or when no reward is given at all.
    """
    rewards: list[RewardFunc] = []
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    for name in script_args.reward_funcs or []:
        rewards.append(reward_function(name, training_args))
    if not rewards and not script_args.environment:  # which may have a reward of its own
        raise ValueError(
            "No reward: give `--reward_funcs` (TRL's names or import paths), `--reward_model_name_or_path`, or an "
            "`--environment` with a `get_reward`."
        )
    return rewards


def reward_function(name: str, config: TreePOConfig | TreeSamplingConfig) -> Callable[..., list[float | None]]:
    """
    A reward function by TRL's name or by import path; `config` has the lengths of the overlong punishment.

    Raises:
        ValueError: for a name that is neither.
    """
    return _trl_reward(name, config) if name in TRL_REWARDS else _imported_reward(name)


def _trl_reward(name: str, config: TreePOConfig | TreeSamplingConfig) -> Callable[..., list[float | None]]:
    from trl import rewards  # pyright: ignore

    if name == "get_soft_overlong_punishment":
        assert config.segment_length is not None, "set in __post_init__"
        return rewards.get_soft_overlong_punishment(
            max_completion_len=config.max_completion_length, soft_punish_cache=config.segment_length
        )
    return getattr(rewards, name)


def _imported_reward(name: str) -> Callable[..., list[float | None]]:
    if "." not in name or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"`--reward_funcs {name}` is no reward of TRL. Choose from {', '.join(TRL_REWARDS)}, or give an import "
            "path such as `my_package.rewards.my_reward`."
        )
    return cast("Callable[..., list[float | None]]", imported("--reward_funcs", name, "."))


def imported(option: str, path: str, separator: str) -> Callable[..., object]:
    """
    The function or class that an option names.

    Args:
        option (`str`):
            Its name in errors.
        path (`str`):
            Import path of a module, separator, and the name in it.
        separator (`str`):
            What stands between the two.

    Raises:
        ValueError: if there is none.
    """
    check_import_path(option, path, separator)
    find_beside_run()
    module_name, _, attribute = path.rpartition(separator)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(could_not_load(option, path, error)) from error
    if not callable(found):
        raise ValueError(f"`{option} {path}` is a {type(found).__name__}; give a function or class.")
    return found


def load_splits(
    script_args: TreePOScriptArguments, training_args: TreePOConfig, dataset_args: DatasetMixtureConfig
) -> tuple[Dataset | IterableDataset | None, Dataset | IterableDataset | None]:
    """The splits to train and to evaluate on; none where an environment gives the prompts."""
    if script_args.environment and not script_args.dataset_name and not dataset_args.datasets:
        return None, None
    dataset = load_train_and_test(script_args, dataset_args)
    train_dataset = take_split(dataset, script_args.dataset_train_split, "--dataset_train_split")
    if training_args.eval_strategy == "no":
        return train_dataset, None
    return train_dataset, take_split(dataset, script_args.dataset_test_split, "--dataset_test_split")


def load_train_and_test(
    script_args: TreePOScriptArguments, dataset_args: DatasetMixtureConfig
) -> DatasetDict | IterableDatasetDict:
    """
    The dataset splits from a mixture, a local file or folder, or the hub.

    Raises:
        ValueError: if no dataset is given, or the file's kind is unknown.
    """
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
