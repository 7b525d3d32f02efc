"""Checks of a recipe that load no model: its settings, its plan, its number type."""

import copy
from typing import Any

import torch

from treepo_trl.apps.plan.command import no_share, plan_training
from treepo_trl.engine_choice import policy_engine_for
from treepo_trl.memory import GIB, NotPlannedError
from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.settings.arguments import check_arguments
from treepo_trl.treepo_config import TreePOConfig

from .environment import installed_as
from .findings import CHANGE_SETTING, BrokenError, CannotRunError, in_words, last_line
from .recipe import Recipe


_SETTING = {"bfloat16": "bf16: true", "float16": "fp16: true, bf16: false", "float32": "bf16: false"}


def check_settings(recipe: Recipe) -> str:
    """Ask what a training asks before it loads a model: engine, adapter, and what does not go together."""
    args, model = copy.copy(recipe.training), recipe.model
    for package, is_needed in (("vllm", args.use_vllm), ("peft", model.use_peft)):
        if is_needed and installed_as(package) is None:
            raise CannotRunError(f"{package} is not installed, and knows what it takes")
    if args.vllm_gpu_memory_utilization == "auto":
        args.vllm_gpu_memory_utilization = 0.5  # where the training puts what it has planned
    tools: Any = recipe.tools  # import paths: only whether there are some is asked for
    try:
        check_arguments(args, tools, None, recipe.environment)
        policy_engine_for(args, str(model.model_name_or_path), recipe.adapter or new_adapter_config(model))
    except (ValueError, TypeError) as error:
        raise BrokenError(str(error), CHANGE_SETTING) from error
    except (ImportError, OSError) as error:  # of vLLM, which the engine's check says more about
        raise CannotRunError(f"vLLM cannot be imported: {error}") from error
    return "no setting is refused before the model is loaded"


def check_memory(recipe: Recipe) -> str:
    """Check whether a recipe fits the card that is named, or the one that is here and what of it is free."""
    card, free = _card(recipe)
    try:
        plan = plan_training(recipe.training, recipe.model, card, recipe.adapter)
    except OSError as error:  # no such model, or no way to the hub
        raise CannotRunError(f"the config of the recipe's model cannot be read: {last_line(str(error))}") from error
    except (NotPlannedError, RuntimeError, AttributeError, LookupError, TypeError) as error:  # it cannot be built so
        if recipe.training.vllm_gpu_memory_utilization == "auto":
            raise BrokenError(in_words(no_share(error)), CHANGE_SETTING) from error
        cause = str(error) if isinstance(error, NotPlannedError) else in_words(error)
        raise CannotRunError(f"the plan does not count this training, which goes on without: {cause}") from error
    except ValueError as error:
        raise BrokenError(in_words(error), CHANGE_SETTING) from error
    problems = [problem.partition(": ") for problem in plan.problems()]
    if problems:
        causes, _, remedies = zip(*problems, strict=True)
        raise BrokenError(f"{'. '.join(causes)}.", " ".join(each[:1].upper() + each[1:] for each in remedies))
    taken = max(plan.rollout, plan.update)
    if free is not None and taken > free:
        raise BrokenError(
            f"The recipe takes {taken / GIB:.1f} GiB at most, and {free / GIB:.1f} of the card's "
            f"{card / GIB:.1f} are free.",
            "End the other processes on the card (`nvidia-smi` lists them).",
        )
    return f"the recipe takes {taken / GIB:.1f} GiB at most, of {card / GIB:.1f} (planned, not measured)"


def _card(recipe: Recipe) -> tuple[float, float | None]:
    """Bytes of the card that is planned for, and of them the free ones; `None` for a card that is not here."""
    if recipe.card_gib is not None:
        return recipe.card_gib * GIB, None
    if recipe.device.type == "cpu":
        raise CannotRunError("this machine has no card; say how large it is (`--card_gib 24`)")
    try:
        free, card = map(float, torch.cuda.mem_get_info(0))
    except RuntimeError as error:
        raise CannotRunError(f"the card's memory cannot be read: {in_words(error)}") from error
    return card, free


def check_number_type(recipe: Recipe) -> str:
    """Ask transformers and the trainer, which refuse types by what they know of the machine; or say which to set."""
    device = recipe.device.type
    if recipe.number_type is None:
        on_cpu = ", with `use_cpu: true` on a processor" if device == "cpu" else ""
        return f"set `{_SETTING[half_type(recipe.device)]}`{on_cpu}"
    bf16, fp16 = (recipe.number_type == each for each in ("bfloat16", "float16"))
    try:
        args = TreePOConfig("unused", bf16=bf16, fp16=fp16, use_cpu=recipe.use_cpu, report_to=[])
        check_arguments(args, None, None, None)
    except ValueError as error:
        cause = f"{recipe.number_type} is refused here: {last_line(str(error))}"
        raise BrokenError(cause, _instead_of(recipe.number_type)) from error
    return f"{recipe.number_type} is taken on {device}"


def half_type(device: torch.device) -> str:
    """The half precision that a device computes in. On cards without bfloat16 torch only imitates it."""
    return "float16" if device.type == "cuda" and not torch.cuda.is_bf16_supported(False) else "bfloat16"


def _instead_of(number_type: str) -> str:
    if not torch.cuda.is_available():
        settings = "`use_cpu: true`, `fp16: false`" if number_type == "float16" else "`use_cpu: true`"
        return f"This recipe is for a GPU. To train on a processor set {settings} and `bf16: false`."
    return f"Set `{_SETTING['float16' if number_type == 'bfloat16' else 'bfloat16']}`."
