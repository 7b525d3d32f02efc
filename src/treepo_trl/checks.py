"""Checks of a trainer's arguments that would otherwise fail late, each with what was set and what to do."""

from dataclasses import fields
from typing import Any

from datasets import Dataset, IterableDataset
from trl.import_utils import is_vllm_available

from .engines import SamplingOptions
from .model_support import has_attention_dropout
from .treepo_config import TreePOConfig


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


def check_arguments(args: TreePOConfig, tools: Any, rollout_func: Any, environment_factory: Any) -> None:
    """
    Raise for arguments that `TreePOTrainer` cannot serve.

    Raises:
        TypeError: if `args` is no `TreePOConfig`.
        ValueError: for features that are not supported yet and for generation settings that segments cannot have.
        ImportError: if vLLM is asked for and not installed.
    """
    if not isinstance(args, TreePOConfig):
        raise TypeError(
            f"`args` is a `{type(args).__name__}`. Pass a `TreePOConfig`, which takes all fields of `GRPOConfig`."
        )
    for name, value in (
        ("tools", tools),
        ("environment_factory", environment_factory),
        ("rollout_func", rollout_func),
    ):
        if value:
            raise ValueError(
                f"`{name}` is not supported yet by `TreePOTrainer`: a tree's segments continue one model turn. "
                "Leave it out, or use `GRPOTrainer`."
            )
    sampling: Any = args.generation_kwargs or {}
    generation_kwargs = set(sampling)
    temperature = sampling.get("temperature", args.temperature)
    if not temperature > 0:
        raise ValueError(f"`generation_kwargs` has temperature {temperature}; training samples and needs one above 0.")
    if not args.use_vllm:
        unknown = sorted(generation_kwargs - set(_SAMPLING_FIELDS))
        if unknown:
            raise ValueError(
                f"`generation_kwargs` has {', '.join(unknown)}, which the transformers engine does not know. It takes "
                f"{', '.join(_SAMPLING_FIELDS)}. Remove the others, or set `use_vllm=True`."
            )
        return
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm=True`, but vLLM is not installed. Run `pip install treepo-trl[vllm]`, or leave `use_vllm` out "
            "to sample with transformers."
        )
    reserved = sorted(generation_kwargs & set(_RESERVED_VLLM_FIELDS))
    if reserved:
        raise ValueError(
            f"`generation_kwargs` has {', '.join(reserved)}, which the tree sampler sets itself "
            "or that would act on each segment by itself. Remove them; `segment_length`, `max_completion_length`, "
            "`stop_pattern` and `repetition_penalty` act on paths."
        )
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError(
            "`vllm_structured_outputs_regex` is not supported: it would have to match each segment by itself. Leave "
            "it out."
        )


def check_packing(
    args: TreePOConfig, model_config: Any, accelerator: Any, is_sharded: bool, has_aux_loss: bool
) -> None:
    """
    Raise for settings of the packed update that this model and machine do not have.

    Raises:
        ValueError: with what was set and what to set instead.
    """
    if args.tree_packing == "flex":
        device_type = accelerator.device.type
        if device_type != "cuda":
            raise ValueError(
                f"`tree_packing='flex'` needs a CUDA device, this is {device_type!r}: FlexAttention has no backward "
                "pass there. Set `tree_packing='sdpa'` or 'auto'."
            )
        if model_config._attn_implementation == "eager":
            raise ValueError(
                "`tree_packing='flex'` needs a model whose attention can be replaced, this one has 'eager'. Load it "
                "with `attn_implementation='sdpa'`."
            )
        if has_attention_dropout(model_config):
            raise ValueError(
                f"`tree_packing='flex'` has no dropout, but the model has `attention_dropout="
                f"{model_config.attention_dropout}`. Set that to 0, or `tree_packing='sdpa'`."
            )
    if args.max_tokens_per_micro_batch is None:
        return
    if is_sharded:
        raise ValueError(
            "`max_tokens_per_micro_batch` is not supported with FSDP and DeepSpeed: their processes would run "
            "different numbers of forwards and wait for each other. Lower `per_device_train_batch_size` instead."
        )
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if accelerator.num_processes > 1 and args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "`max_tokens_per_micro_batch` is not supported with several processes and `use_reentrant=True` in "
            "`gradient_checkpointing_kwargs`: gradients would be reduced before the last piece. Set it to False."
        )
    if has_aux_loss:
        raise ValueError(
            "`max_tokens_per_micro_batch` is not supported with a load-balancing loss, which would depend on how the "
            "rows are cut. Lower `per_device_train_batch_size` instead, or set `router_aux_loss_coef=0`."
        )


def check_datasets(*datasets: Any) -> None:
    """
    Raise for datasets without prompts or with images.

    Columns are checked where the dataset knows them; a streamed dataset may not.

    Raises:
        ValueError: naming the dataset's columns.
    """
    for dataset in datasets:
        if isinstance(dataset, dict):
            check_datasets(*dataset.values())
        if not isinstance(dataset, Dataset | IterableDataset) or dataset.column_names is None:
            continue
        columns = dataset.column_names
        if "prompt" not in columns:
            raise ValueError(
                f"The dataset has no column 'prompt', only {', '.join(columns) or 'none at all'}. Rename the column "
                "that holds the prompts, as text or as a list of messages, to 'prompt'."
            )
        images = sorted({"image", "images"} & set(columns))
        if images:
            raise ValueError(
                f"The dataset has the column '{images[0]}': image prompts are not supported yet by `TreePOTrainer`. "
                "Remove the column, or use `GRPOTrainer`."
            )


def check_dynamic_sampling(args: TreePOConfig, trainer_class: type, base_class: type) -> None:
    """
    Raise for a trainer class whose own order of prompts dynamic sampling would not follow.

    Raises:
        ValueError: naming the method that `trainer_class` has and `base_class` has not.
    """
    if args.dynamic_sampling_rounds == 0:
        return
    for name in ("_get_train_sampler", "get_train_dataloader"):
        if getattr(trainer_class, name) is not getattr(base_class, name):
            raise ValueError(
                f"`dynamic_sampling_rounds={args.dynamic_sampling_rounds}` draws prompts from the dataset itself, but "
                f"`{trainer_class.__name__}` overrides `{name}`. Order the dataset instead (`shuffle_dataset=False` "
                "keeps that order), or set `dynamic_sampling_rounds=0`."
            )


def check_engine_weights(args: TreePOConfig, uses_adapter_sync: bool) -> None:
    """
    Raise for settings of a LoRA engine's weights where there is no LoRA engine.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("vllm_share_base_weights", "vllm_sleep_keeps_weights"):
        if getattr(args, name) and not uses_adapter_sync:
            raise ValueError(
                f"`{name}=True`, but the policy has no adapter: vLLM gets all its weights at each step. Pass a "
                "`peft_config` (`--use_peft`), or unset it."
            )
