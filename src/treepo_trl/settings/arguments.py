"""Arguments of a trainer that it cannot serve, and tools that it cannot describe: what was set, and what to do."""

import inspect
from collections.abc import Callable
from dataclasses import fields

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import get_json_schema
from trl.import_utils import is_vllm_available
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.engines import SamplingOptions
from treepo_trl.treepo_config import TreePOConfig

from .exclusions import OF_TRAINER, check_exclusions


_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingOptions))
_RESERVED_VLLM_FIELDS = (
    "n",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "flat_logprobs",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "detokenize",
    "output_kind",
    "structured_outputs",
    # These would act on each segment by itself: equal siblings, cut prefixes, penalties that forget the path.
    "seed",
    "truncate_prompt_tokens",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
    "logits_processors",
)


def check_arguments(
    args: TreePOConfig,
    tools: list[Callable[..., object]] | None,
    rollout_func: Callable[..., object] | None,
    environment_factory: object,
) -> None:
    """
    Raise for arguments that `TreePOTrainer` cannot serve.

    Raises:
        TypeError: if `args` is no `TreePOConfig`.
        ValueError: for features that are not supported yet, for generation settings that segments cannot have, and
            for a logger that is not installed.
        ImportError: if vLLM is asked for and not installed.
    """
    if not isinstance(args, TreePOConfig):
        raise TypeError(
            f"`args` is a `{type(args).__name__}`. Pass a `TreePOConfig`, which takes all fields of `GRPOConfig`."
        )
    check_exclusions(args, OF_TRAINER, tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
    check_number_type(args)
    _check_loggers(args)
    options = args.generation_options()
    if args.use_vllm:
        _check_vllm(options)
        return
    if options.get("do_sample") is True:  # asks for what happens anyway
        del options["do_sample"]
    unknown = sorted(set(options) - set(_SAMPLING_FIELDS))
    if unknown:
        raise ValueError(
            f"`generation_kwargs` has {', '.join(unknown)}, which the transformers engine does not know. It takes "
            f"{', '.join(_SAMPLING_FIELDS)}, and `do_sample=True`. Remove the others, or set `use_vllm=True`."
        )


def check_number_type(args: TreePOConfig) -> None:
    """
    Raise for mixed precision that this machine does not have.

    Raises:
        ValueError: with the settings to use instead.
    """
    on_cuda = torch.cuda.is_available() and not args.use_cpu
    # By default torch counts a bfloat16 that is emulated, which is slow, and which vLLM refuses later.
    if args.bf16 and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"`bf16=True`, but this card ({torch.cuda.get_device_name()}) has no bfloat16. Set `fp16=True`, "
            "`bf16=False` and `dtype='float16'` (`--fp16 true --bf16 false --dtype float16`)."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "`fp16=True` needs a GPU: on a processor accelerate would compute in float32 without a word. Set "
            "`fp16=False`, and `bf16` where the processor has it."
        )


def _check_loggers(args: TreePOConfig) -> None:
    """Raise for loggers that are not installed: transformers does so once the model is loaded."""
    missing = set(args.report_to or ()).intersection(INTEGRATION_TO_CALLBACK)
    # The list leaves one out, and the other where mlflow is there too.
    missing -= {*get_available_reporting_integrations(), "flyte", "azure_ml"}
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"`report_to` has {names}, which is not installed. Install it, or take it out.")


def _check_vllm(options: dict[str, object]) -> None:
    """Raise for `generation_kwargs` that segments of vLLM cannot have."""
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm=True`, but vLLM is not installed. Run `pip install treepo-trl[vllm]`, or leave `use_vllm` out "
            "to sample with transformers."
        )
    reserved = sorted(set(options) & set(_RESERVED_VLLM_FIELDS))
    if reserved:
        raise ValueError(
            f"`generation_kwargs` has {', '.join(reserved)}, which the tree sampler sets itself "
            "or that would act on each segment by itself. Remove them; `segment_length`, `max_completion_length`, "
            "`stop_pattern` and `repetition_penalty` act on paths."
        )
    if options:
        from vllm import SamplingParams

        try:
            SamplingParams(**options)  # pyright: ignore[reportArgumentType] - whatever they are
        except Exception as error:  # vLLM's own classes differ between its versions
            raise ValueError(
                f"`generation_kwargs` is {options}, which vLLM's `SamplingParams` refuses: {error}. Remove what it "
                "does not know, and change what is out of range."
            ) from error


_HOOKS = ("fork", "close")  # of environments, as their authors may call them


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
