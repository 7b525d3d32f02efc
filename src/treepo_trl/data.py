"""Datasets from the hub, from local files and folders, and prompts from standard input."""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


_DATA_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_named_dataset(name: str, config_name: str | None, file_split: str, streaming: bool = False) -> Any:
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
        ValueError: if a file is missing or of an unknown kind.
    """
    path = Path(name)
    if path.suffix in _DATA_BUILDERS and not path.is_file():
        raise ValueError(f"`--dataset_name {name}` looks like a file, but there is none at {path.absolute()}.")
    if path.is_file():
        builder = _DATA_BUILDERS.get(path.suffix)
        if builder is None:
            raise ValueError(
                f"`--dataset_name {name}` ends in {path.suffix!r}; known are {', '.join(_DATA_BUILDERS)}."
            )
        return load_dataset(builder, data_files={file_split: name}, streaming=streaming)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict({file_split: saved})
    return load_dataset(name, name=config_name, streaming=streaming)


def read_prompts(stream: TextIO | None = None) -> Dataset:
    """
    Prompts from standard input, one per line: a JSON object with the key `prompt`, or text as it is.

    Raises:
        ValueError: if there are no lines.
    """
    lines = [line.rstrip("\n") for line in (sys.stdin if stream is None else stream)]
    rows: list[dict[str, Any]] = []
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        rows.append(row if isinstance(row, dict) and "prompt" in row else {"prompt": line})
    if not rows:
        raise ValueError(
            "Standard input holds no prompts: give one per line, as text or as JSON with the key 'prompt'."
        )
    kinds = {isinstance(row["prompt"], str) for row in rows}
    if len(kinds) > 1:
        raise ValueError("Standard input mixes text prompts and lists of messages: give all prompts in one form.")
    return Dataset.from_list([{"prompt": row["prompt"]} for row in rows])


def prompt_token_ids(prompts: list[Any], tokenizer: Any) -> list[list[int]]:
    """
    Token ids of prompts given as text or as lists of messages, as `GRPOTrainer` makes them.

    Raises:
        ValueError: for messages without a chat template, and prompts of another kind.
    """
    ids: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids.append(list(tokenizer(prompt)["input_ids"]))
        elif isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt) and prompt:
            if tokenizer.chat_template is None:
                raise ValueError(
                    "The prompts are messages, but the tokenizer has no chat template. Give text prompts."
                )
            encoded = tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=prompt[-1]["role"] == "user",
                return_dict=True,
                continue_final_message=prompt[-1]["role"] == "assistant",
            )
            ids.append(list(encoded["input_ids"]))
        else:
            raise ValueError(
                f"Prompt {i} is {prompt!r:.80}: give text, or a list of messages with 'role' and 'content'."
            )
    return ids
