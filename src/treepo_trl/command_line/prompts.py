"""Datasets from the hub, from local files and folders, and prompts from standard input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError

from treepo_trl.preflight import BUILDERS, check_data_file

from .arguments import SampleArguments


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_prompts(arguments: SampleArguments) -> list[object]:
    """
    Prompts of the dataset, text or messages.

    Raises:
        ValueError: if the split or the column does not exist.
    """
    if arguments.dataset_name == "-":
        if sys.stdin.isatty():
            print("Type prompts, one per line, and end with Ctrl-D; or set `--dataset_name`.", file=sys.stderr)
        return read_prompts(sys.stdin, arguments.prompt_column or "prompt")[: arguments.max_prompts]
    splits = load_named_dataset(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
    dataset = cast(Dataset, take_split(splits, arguments.dataset_split, "--dataset_split"))  # not streamed
    return list(dataset[prompt_column(dataset, arguments.prompt_column)][: arguments.max_prompts])


def prompt_column(dataset: Dataset, asked_for: str | None) -> str:
    """
    The column of the prompts: what is asked for, `prompt`, or the only one.

    Raises:
        ValueError: naming the columns, if there is none.
    """
    columns = dataset.column_names
    column = asked_for or ("prompt" if "prompt" in columns or len(columns) != 1 else columns[0])
    if column not in columns:
        raise ValueError(f"The dataset has no column {column!r}, only {', '.join(columns)}. Set `--prompt_column`.")
    return column


def load_named_dataset(
    name: str, config_name: str | None, file_split: str, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """
    Splits of a dataset of the hub, of a local file, or of a folder written by `Dataset.save_to_disk`.

    Args:
        name (`str`):
            Hub id, file or folder.
        config_name (`str`, *optional*):
            Configuration of a hub dataset.
        file_split (`str`):
            Name that a single file's or folder's only split gets.
        streaming (`bool`):
            Whether to stream.

    Raises:
        ValueError: if a file is missing, empty, broken or of an unknown kind.
    """
    check_data_file(name)
    path = Path(name)
    if path.is_file():
        builder = BUILDERS[path.suffix]
        try:
            return _splits(load_dataset(builder, data_files={file_split: name}, streaming=streaming))
        except DatasetGenerationError as error:
            raise ValueError(f"`--dataset_name {name}` is no valid {builder} file: {error.__cause__}.") from error
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict({file_split: saved})
    return _splits(load_dataset(name, name=config_name, streaming=streaming))


def _splits(loaded: object) -> DatasetDict | IterableDatasetDict:
    return cast(DatasetDict | IterableDatasetDict, loaded)  # `load_dataset` without `split`


def take_split(splits: DatasetDict | IterableDatasetDict, name: str, flag: str) -> Dataset | IterableDataset:
    """
    One split of a dataset.

    Raises:
        ValueError: naming the splits and the option that chooses one, if there is no such split.
    """
    if name not in splits:
        raise ValueError(f"The dataset has no split {name!r}, only {', '.join(map(str, splits))}. Set `{flag}`.")
    return splits[name]


def read_prompts(stream: TextIO, key: str = "prompt") -> list[object]:
    """
    Prompts from standard input, one per line: every line a JSON object with a `key`, or every line text as it is.

    Raises:
        ValueError: if there are no lines, or some are no JSON objects while others are, or lack the key.
    """
    lines = {number: line.rstrip("\n") for number, line in enumerate(stream, 1) if line.strip()}
    if not lines:
        raise ValueError(
            f"Standard input holds no prompts: give one per line, as text or as JSON with the key {key!r}, or name a "
            "dataset with `--dataset_name`."
        )
    rows = {number: _json_object(line) for number, line in lines.items()}
    if not any(row is not None for row in rows.values()):
        return list(lines.values())
    prompts: list[object] = []
    for number, row in rows.items():
        if row is None:
            raise ValueError(
                f"Line {number} of standard input is no JSON object, but other lines are: {lines[number]!r:.80}. Give "
                "all prompts as text, or all as JSON."
            )
        if key not in row:
            raise ValueError(
                f"Line {number} of standard input has no key {key!r}, only {', '.join(row)}. Set `--prompt_column`."
            )
        prompts.append(row[key])
    return prompts


def _json_object(line: str) -> dict[str, object] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def prompt_token_ids(
    prompts: Sequence[object],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict | None = None,
) -> list[list[int]]:
    """
    Token ids of prompts given as text or as lists of messages, as `GRPOTrainer` makes them.

    Raises:
        ValueError: for messages without a chat template or that it refuses, and prompts of another kind.
    """
    return [_token_ids(i, prompt, tokenizer, chat_template_kwargs or {}) for i, prompt in enumerate(prompts)]


def _token_ids(i: int, prompt: object, tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: dict) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)):
        raise ValueError(f"Prompt {i} is {prompt!r:.80}: give text, or a list of messages with 'role' and 'content'.")
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are messages, but the tokenizer has no chat template. Give text prompts, or choose a model "
            "with a template."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, **chat_template_kwargs
        )
    except TemplateError as error:
        raise ValueError(f"The chat template refuses prompt {i}, {prompt!r:.80}: {error}") from error
    return list(cast(dict[str, list[int]], encoded)["input_ids"])
