"""Checks of a trainer's arguments that would otherwise fail late, each with what was set and what to do."""

from collections.abc import Callable
from dataclasses import fields

from datasets import Dataset, IterableDataset
from trl.import_utils import is_vllm_available
from trl.trainer.grpo_trainer import GRPOTrainer

from .engines import SamplingOptions
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
    given = set(args.generation_options())
    if args.use_vllm:
        _check_vllm(args, given)
        return
    unknown = sorted(given - set(_SAMPLING_FIELDS))
    if unknown:
        raise ValueError(
            f"`generation_kwargs` has {', '.join(unknown)}, which the transformers engine does not know. It takes "
            f"{', '.join(_SAMPLING_FIELDS)}. Remove the others, or set `use_vllm=True`."
        )


def _check_vllm(args: TreePOConfig, given: set[str]) -> None:
    """Raise for `generation_kwargs` of these names, and other settings, that segments of vLLM cannot have."""
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm=True`, but vLLM is not installed. Run `pip install treepo-trl[vllm]`, or leave `use_vllm` out "
            "to sample with transformers."
        )
    reserved = sorted(given & set(_RESERVED_VLLM_FIELDS))
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


def check_datasets(*datasets: object) -> None:
    """
    Raise for datasets, or dictionaries of them, without prompts or with images.

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


def check_dynamic_sampling(args: TreePOConfig, trainer_class: type, base_class: type[GRPOTrainer]) -> None:
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
