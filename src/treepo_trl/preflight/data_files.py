"""Files and folders that options name: whether they are there, and of a known kind."""

from pathlib import Path


BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Endings of data files, and what `datasets` calls their kind."""


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
