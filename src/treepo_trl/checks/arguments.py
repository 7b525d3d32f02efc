"""Arguments of a trainer that it cannot serve: what was set, and what to do."""

from collections.abc import Callable
from dataclasses import fields

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl.import_utils import is_vllm_available

from treepo_trl.engines import SamplingOptions
from treepo_trl.treepo_config import TreePOConfig

from .turns import check_turns


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
    check_turns(args, tools, rollout_func, environment_factory)
    check_number_type(args)
    _check_loggers(args)
    options = args.generation_options()
    if args.use_vllm:
        _check_vllm(args, options)
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


def _check_vllm(args: TreePOConfig, options: dict[str, object]) -> None:
    """Raise for `generation_kwargs`, and other settings, that segments of vLLM cannot have."""
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
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError(
            "`vllm_structured_outputs_regex` is not supported: it would have to match each segment by itself. Leave "
            "it out."
        )
