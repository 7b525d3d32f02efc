"""Would `treepo-trl train` take these settings? Its own checks that need no model."""

import copy
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from treepo_trl.policy.for_training import policy_engine_for
from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.settings.arguments import check_arguments
from treepo_trl.treepo_config import TreePOConfig

from .environment import installed_as
from .findings import CHANGE_SETTING, BrokenError, CannotRunError


if TYPE_CHECKING:
    from peft import PeftConfig


def check_settings(
    training_args: TreePOConfig,
    model_args: ModelConfig,
    adapter: "PeftConfig | None" = None,
    tools: list[str] | None = None,
    environment: str | None = None,
) -> str:
    """
    Ask what a training asks before it loads a model: engine, adapter, and what does not go together.

    Args:
        training_args ([`TreePOConfig`]), model_args ([`~trl.ModelConfig`]):
            The recipe. Its number type has a check of its own.
        adapter ([`~peft.PeftConfig`], *optional*):
            The adapter that the training goes on from.
        tools (`list[str]`, *optional*), environment (`str`, *optional*):
            Import paths, which are not imported here.
    """
    for package, is_needed in (("vllm", training_args.use_vllm), ("peft", model_args.use_peft)):
        if is_needed and installed_as(package) is None:
            raise CannotRunError(f"{package} is not installed, and knows what it takes")
    args = copy.copy(training_args)
    if args.vllm_gpu_memory_utilization == "auto":
        args.vllm_gpu_memory_utilization = 0.5  # where the training puts what it has planned
    given: Any = tools  # only whether there are some is asked for
    try:
        check_arguments(args, given, None, environment)
        policy_engine_for(args, str(model_args.model_name_or_path), adapter or new_adapter_config(model_args))
    except (ValueError, TypeError) as error:
        raise BrokenError(str(error), CHANGE_SETTING) from error
    except (ImportError, OSError) as error:  # of vLLM, which the engine's check says more about
        raise CannotRunError(f"vLLM cannot be imported: {error}") from error
    return "no setting is refused before the model is loaded"
