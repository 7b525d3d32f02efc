"""Data and tokenizers that cannot be trained on: what was given, and what to do."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import cast

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.trl.host import Host, tokenizes_as_trl


def check_datasets(
    args: TreePOConfig,
    trainer_class: type[GRPOTrainer],
    base_class: type[GRPOTrainer],
    train_dataset: object,
    eval_dataset: object,
    has_environments: bool = False,
) -> None:
    """
    Raise for datasets that cannot be trained or evaluated on, before a model is loaded.

    Columns and sizes are checked where the dataset knows them; a streamed dataset may not, and its rows are checked
    when they come.

    Args:
        args ([`TreePOConfig`]):
            Settings of the training.
        trainer_class (`type`), base_class (`type`):
            Class of the trainer, and the one whose order of prompts is known here.
        train_dataset, eval_dataset:
            As the trainer takes them; the second may be a dictionary of datasets.
        has_environments (`bool`):
            Whether environments give the prompts, so that the dataset needs none.

    Raises:
        ValueError: naming the dataset's columns or size.
    """
    changed = [name for name in _ORDERING_METHODS if getattr(trainer_class, name) is not getattr(base_class, name)]
    if changed and args.chooses_prompts:
        raise ValueError(
            f"`{args.chooses_prompts}` draws prompts from the dataset itself, but "
            f"`{trainer_class.__name__}` overrides `{changed[0]}`. Order the dataset instead (`shuffle_dataset=False` "
            "keeps that order), or leave the setting out."
        )
    for dataset in (train_dataset, *_all_of(eval_dataset)):
        _check_columns(dataset, has_environments)
    if args.prompt_selection != "off" and has_environments and "prompt" not in (_columns_of(train_dataset) or ()):
        raise ValueError(
            f"`prompt_selection={args.prompt_selection!r}` knows a prompt by its row, but the rows have no column "
            "'prompt': environments give the prompts, and rows that are equal are not one task. Leave the setting out."
        )
    if isinstance(train_dataset, Dataset) and not changed:  # another order may repeat prompts
        _check_size(args, len(train_dataset))
    if any(isinstance(dataset, Dataset) and len(dataset) == 0 for dataset in _all_of(eval_dataset)):
        raise ValueError("The evaluation dataset has no rows. Check how it is loaded and filtered, or leave it out.")


_ORDERING_METHODS = ("_get_train_sampler", "get_train_dataloader")


def _all_of(dataset: object) -> Iterable[object]:
    """The datasets of a dictionary, or the one."""
    return dataset.values() if isinstance(dataset, dict) else (dataset,)


def _columns_of(dataset: object) -> list[str] | None:
    return dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None


def _check_columns(dataset: object, has_environments: bool) -> None:
    columns = _columns_of(dataset)
    if columns is None:
        return
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":  # rows have the columns of a transform
        return
    if "prompt" not in columns and not has_environments:
        raise _no_prompt_column(columns)
    images = sorted({"image", "images"} & set(columns))
    if images:
        raise ValueError(
            f"The dataset has the column '{images[0]}': image prompts are not supported yet by `TreePOTrainer`. "
            "Remove the column, or use `GRPOTrainer`."
        )


def _no_prompt_column(columns: Iterable[str]) -> ValueError:
    return ValueError(
        f"The dataset has no column 'prompt', only {', '.join(columns) or 'none at all'}. Rename the column "
        "that holds the prompts, as text or as a list of messages, to 'prompt'."
    )


def _check_size(args: TreePOConfig, num_prompts: int) -> None:
    """
    Raise for a dataset that does not fill one batch.

    GRPOTrainer leaves out what does not fill a batch at the end of a pass: it would make no step, and report success.
    Dynamic sampling could fill a batch from several passes, which would then hold the same prompt twice.
    """
    if num_prompts < _prompts_per_batch(args):
        raise ValueError(
            f"The training dataset has {num_prompts} of {_batch_in_words(args)}. Nothing would be trained. "
            "Lower `per_device_train_batch_size`, or `steps_per_generation` (by default "
            "`gradient_accumulation_steps`), use fewer processes, or add prompts."
        )


def _prompts_per_batch(args: TreePOConfig) -> int:
    """Prompts of all processes in one generation batch."""
    return args.per_device_train_batch_size * args.steps_per_generation * args.world_size // args.num_generations


def _batch_in_words(args: TreePOConfig) -> str:
    return (
        f"the {_prompts_per_batch(args)} prompts that one generation batch takes: `per_device_train_batch_size` "
        f"({args.per_device_train_batch_size}) x `steps_per_generation` ({args.steps_per_generation}) x processes "
        f"({args.world_size}) / `num_generations` ({args.num_generations})"
    )


class NoStepIsAnError(TrainerCallback):
    """
    Raises after a pass over the training data without a single step.

    A streamed dataset has no length, so that it is too short shows only then. TRL and transformers end the training
    with a warning, and report success.
    """

    def __init__(self) -> None:
        self._has_rows = False

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        """Called by the trainer for the first rows of a step."""
        self._has_rows = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the trainer."""
        if state.global_step == 0 and not self._has_rows and isinstance(args, TreePOConfig):
            raise ValueError(
                f"A pass over the training dataset made no step: it has not given {_batch_in_words(args)}. "
                "Check how the dataset is loaded and filtered, and that it can be read more than once; or lower "
                "`per_device_train_batch_size` or `steps_per_generation`."
            )


def check_tokenizer(trainer: GRPOTrainer) -> None:
    """
    Raise for a tokenizer that does not go with the model or the data of a trainer, before anything is sampled.

    Raises:
        ValueError: naming the token, or the prompt.
    """
    tokenizer = Host(trainer).tokenizer
    if tokenizer.eos_token_id is None:  # TRL takes it for padding too where there is no pad token
        raise ValueError(
            "The tokenizer has no EOS token, so no completion could end. Set `processing_class.eos_token` to the "
            "token that ends an answer of this model."
        )
    vocab_size = cast(PreTrainedModel, trainer.model).config.get_text_config().vocab_size
    for name in ("eos_token", "pad_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id >= vocab_size:
            raise ValueError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} has the id {token_id}, but the model has "
                f"{vocab_size} tokens. Pass the `processing_class` of this model, or call "
                "`model.resize_token_embeddings(len(tokenizer))` first."
            )
    for dataset in (trainer.train_dataset, *_all_of(trainer.eval_dataset)):
        if isinstance(dataset, Dataset):
            check_rows(trainer, [dataset[0]])


def check_rows(trainer: GRPOTrainer, rows: Iterable[Mapping[str, object]]) -> None:
    """
    Raise for rows whose prompts TRL cannot tokenize, or would tokenize as something else.

    A trainer that tokenizes prompts in its own way is not asked.

    Raises:
        ValueError: naming the prompt.
    """
    if not tokenizes_as_trl(trainer):
        return
    for row in rows:
        if "prompt" not in row:
            if trainer.environment_factories is not None:
                continue
            raise _no_prompt_column(row)
        prompt = row["prompt"]
        if isinstance(prompt, str):
            if trainer.tools or trainer.environment_factories is not None:
                raise ValueError(
                    f"The prompt {textwrap.shorten(prompt, 200)!r} is text, but tools and environments need a "
                    "conversation. Give a list of messages such as [{'role': 'user', 'content': 'What is 3 + 4?'}]."
                )
            continue
        if not _is_conversation(prompt):
            raise ValueError(
                f"A prompt of the dataset is {textwrap.shorten(repr(prompt), 200)}. It must be text, or a list of "
                "messages such as [{'role': 'user', 'content': 'What is 3 + 4?'}]. Change or drop such rows."
            )
        if getattr(trainer.processing_class, "chat_template", None) is None:
            raise ValueError(
                "The prompts are lists of messages, but the tokenizer has no chat template. Set "
                "`processing_class.chat_template` (that of an instruction-tuned model of the same family), or give "
                "the prompts as text."
            )


def _is_conversation(prompt: object) -> bool:
    return isinstance(prompt, list) and len(prompt) > 0 and all(_is_message(message) for message in prompt)


def _is_message(message: object) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    # Chat templates read other keys too, such as `tool_calls` or `reasoning_content`.
    others = any(value for key, value in message.items() if key not in ("role", "content"))
    return isinstance(message.get("content"), str | list) or others
