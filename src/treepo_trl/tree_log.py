"""The tree log: the trees of each step in `output_dir/trees`, one JSON line per tree."""

import json
import os
from typing import TypedDict

from .sampling.tree import TreeRecord


class TreeLogLine(TypedDict):
    """A line of the tree log."""

    step: int
    prompt: str
    """Text of the prompt."""
    rows: list[int]
    """Node id of each leaf."""
    rewards: list[float | None]
    """Reward of each leaf; `None` if it could not be scored."""
    advantages: list[float]
    """Advantage of each leaf's last segment."""
    tree: TreeRecord
    """`SegmentTree.from_dict` reads it."""


def write_trees(records: list[TreeLogLine], output_dir: str, step: int, is_first: bool) -> None:
    """
    Write records to `output_dir/trees/trees_<step>.jsonl`.

    The first batch of a step starts the file anew, since a resumed training writes its steps again.
    """
    folder = os.path.join(output_dir, "trees")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"trees_{step:06d}.jsonl"), "w" if is_first else "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
