"""Runs of the commands on the tiny model: a folder with prompts, the flags, and what `sample` writes."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from treepo_trl.sampling import SegmentTree


PROMPTS = ["w1 w2 w3", "w4 w5", "w6", "w7 w8"]
PROMPT_IDS = [[6, 7, 8], [9, 10], [11], [12, 13]]  # w0 is token 5
FLAGS = {"engine": "transformers", "num_generations": 4, "max_completion_length": 12, "segment_length": 4}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The command line of settings; those that are `None` are left out."""
    result: list[str] = []
    for name, value in settings.items():
        if value is not None:
            result += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return result


def arguments(model_name_or_path: str | None, **changes: Any) -> list[str]:
    """Flags of `treepo-trl sample`."""
    files = {"dataset_name": "data.jsonl", "output": "trees.jsonl"}
    return as_flags({"model_name_or_path": model_name_or_path, **files, **FLAGS, **changes})


def read_lines(path: str = "trees.jsonl") -> list[dict[str, Any]]:
    """Lines of an output file, in the order of their prompts."""
    return sorted(map(json.loads, Path(path).read_text().splitlines()), key=lambda record: record["index"])


def read_trees(path: str = "trees.jsonl") -> list[SegmentTree]:
    return [SegmentTree.from_dict(record["tree"]) for record in read_lines(path)]


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell, the rule under the head included."""
    rows = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def save_adapter(model: str, folder: str | Path, seed: int = 1) -> None:
    """A random adapter, large enough to change what the model says."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=8, lora_alpha=512, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(str(folder))


def fail_to_build(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the model was loaded before all was checked")
