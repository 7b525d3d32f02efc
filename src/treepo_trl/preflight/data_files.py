"""Files and folders that options name: whether they are there, of a known kind, with the columns that are needed."""

import csv
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path


BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Endings of data files, and what `datasets` calls their kind."""
_ROWS = 1000
"""Rows of a JSON file whose keys are looked at: a row may lack some."""


def check_data_file(name: str) -> None:
    """
    Raise where a name looks like a file and cannot be read as one.

    Raises:
        ValueError: if the file is missing, empty or of an unknown kind.
    """
    path = Path(name)
    if path.suffix in BUILDERS and not path.is_file():
        raise ValueError(f"`--dataset_name {name}` looks like a file, but there is none at {path.absolute()}.")
    if not path.is_file():
        return
    if path.suffix not in BUILDERS:
        raise ValueError(f"`--dataset_name {name}` ends in {path.suffix!r}; known are {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"`--dataset_name {name}` is an empty file.")


def require_run(name: str) -> Path:
    """
    The folder or file of a run that a name stands for.

    Raises:
        ValueError: if there is nothing.
    """
    path = Path(name)
    if not path.exists():
        raise ValueError(f"`{name}` does not exist. Name a run's `output_dir`, or a checkpoint or file in it.")
    return path


def columns_of(name: str) -> list[str] | None:
    """The columns of a data file; `None` where it is none, or where only `datasets` can tell."""
    path = Path(name)
    if not path.is_file():
        return None
    if path.suffix == ".txt":
        return ["text"]
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names)
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as stream:
            if path.suffix == ".csv":
                return next(filter(None, csv.reader(stream)), None)
            rows = [json.loads(line) for line in islice(stream, _ROWS) if line.strip()]
    except (OSError, ValueError, ImportError):
        return None  # a broken file is told by what reads it, with the reason
    if not rows or not all(isinstance(row, dict) for row in rows):
        return None
    return list(dict.fromkeys(name for row in rows for name in row))


def no_prompt_column(columns: Iterable[str]) -> ValueError:
    """The error about a dataset without prompts, of a training."""
    return ValueError(
        f"The dataset has no column 'prompt', only {', '.join(columns) or 'none at all'}. Rename the column "
        "that holds the prompts, as text or as a list of messages, to 'prompt'."
    )
