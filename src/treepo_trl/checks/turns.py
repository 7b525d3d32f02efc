"""Checks of tools, environments and rollouts: what would fail late, or not at all."""

import inspect
import textwrap

from transformers.utils import get_json_schema
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.treepo_config import TreePOConfig


_HOOKS = ("fork", "close")  # of environments, as their authors may call them


def check_turns(args: TreePOConfig, tools: object, rollout_func: object, environment_factory: object) -> None:
    """
    Raise for what cannot go together with tools, environments or rollouts of one's own.

    Raises:
        ValueError: naming the settings.
    """
    given = {"tools": tools, "environment_factory": environment_factory}
    used = [name for name, value in given.items() if value]
    if used and args.use_vllm and args.vllm_tensor_parallel_size > 1:
        raise ValueError(
            f"`{used[0]}` with `vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` is not supported: all "
            "processes of an engine must ask for the same segments at the same time, and tools take as long as they "
            "take. Set it to 1, with an engine per process."
        )
    if used and args.use_vllm and args.vllm_mode == "server" and args.world_size > 1:
        raise ValueError(
            f"`{used[0]}` with `vllm_mode='server'` and {args.world_size} processes is not supported: one of them "
            "samples for all, and has its own tools alone. Update in one process, or set `vllm_mode='colocate'`."
        )
    ahead = [name for name, value in (given | {"rollout_func": rollout_func}).items() if value]
    if ahead and args.rollout_ahead > 0:
        raise ValueError(
            f"`rollout_ahead={args.rollout_ahead}` samples a batch while another one is scored, but `{ahead[0]}` has "
            "state or threads of its own, which one batch at a time may use. Leave one of them out."
        )
    if rollout_func is None:
        return
    if used:
        raise ValueError(
            f"`rollout_func` samples by itself, so `{used[0]}` would not be used. Leave one of them out; a rollout "
            "can call tools on its own."
        )
    if args.chooses_prompts:
        raise ValueError(
            f"`{args.chooses_prompts}` chooses prompts and samples them before they reach a `rollout_func`. Leave "
            "one of them out."
        )


def check_tools(trainer: GRPOTrainer) -> None:
    """
    Raise for tools that no prompt could name, before anything is sampled.

    Raises:
        ValueError: naming the tool.
    """
    for tool in trainer.tools:
        owner = getattr(tool, "__self__", None)
        name = getattr(tool, "__name__", repr(tool))
        if name in _HOOKS and owner is not None and not inspect.signature(tool).parameters:
            raise ValueError(
                f"{type(owner).__name__} has the public method `{name}`, which becomes a tool of the model, "
                f"like every public method but `reset` and `get_reward`. Call it `_{name}`."
            )
        try:
            get_json_schema(tool)
        except Exception as error:  # of several kinds, all about the function
            whose = f" of {type(owner).__name__}" if owner is not None else ""
            raise ValueError(
                f"The tool '{name}'{whose} cannot be described to the model: {error} A tool needs type hints, and a "
                "docstring with a line for each argument under `Args:`. A method that is no tool begins with an "
                "underscore."
            ) from error


def check_text_prompt(trainer: GRPOTrainer, prompt: str) -> None:
    """
    Raise for a prompt of plain text where there are tools or environments.

    Raises:
        ValueError: naming the prompt.
    """
    if trainer.tools or trainer.environment_factories is not None:
        raise ValueError(
            f"The prompt {textwrap.shorten(prompt, 200)!r} is text, but tools and environments need a conversation. "
            "Give a list of messages such as [{'role': 'user', 'content': 'What is 3 + 4?'}]."
        )
