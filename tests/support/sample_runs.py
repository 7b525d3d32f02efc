"""Runs of `treepo-trl sample` on the tiny model: a folder with prompts, the flags, and what the output file holds."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from treepo_trl.sampling import SegmentTree


PROMPTS = ["w1 w2 w3", "w4 w5", "w6", "w7 w8"]
PROMPT_IDS = [[6, 7, 8], [9, 10], [11], [12, 13]]  # w0 is token 5
FLAGS: dict[str, Any] = {
    "engine": "transformers",
    "num_generations": 4,
    "max_completion_length": 12,
    "segment_length": 4,
}


def enter_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a user's folder with a dataset; nothing on standard input."""
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in PROMPTS))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def arguments(model: str | None, **changes: Any) -> list[str]:
    flags = {"model_name_or_path": model, "dataset_name": "data.jsonl", "output": "trees.jsonl", **FLAGS, **changes}
    result: list[str] = []
    for name, value in flags.items():
        if value is not None:
            result += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return result


def read_lines(path: str = "trees.jsonl") -> list[dict[str, Any]]:
    """Lines of an output file, in the order of their prompts."""
    return sorted(map(json.loads, Path(path).read_text().splitlines()), key=lambda record: record["index"])


def read_trees(path: str = "trees.jsonl") -> list[SegmentTree]:
    return [SegmentTree.from_dict(record["tree"]) for record in read_lines(path)]


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell, the rule under the head included."""
    rows = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def fail_to_build(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the model was loaded before all was checked")
