"""Tree logs made by hand."""

import json
from pathlib import Path
from typing import Any

from treepo_trl.sampling import SegmentTree


def small_tree(first_token: int = 0) -> SegmentTree:
    """
    Three leaves below two children of the prompt; the leaf on the right came with a fallback.

        [5 6] ── [7 8] stop
              └─ [9] length
        [10] ── [11 12 13] pattern
    """
    tree = SegmentTree([1 + first_token, 2])
    first = tree.add(None, [5, 6], [-0.5, -1.5], entropy=1.25)
    tree.add(first, [7, 8], [-1.0, -2.0], "stop", 0.5)
    tree.add(first, [9], [-3.0], "length", 2.0)
    second = tree.add(None, [10], [-0.25], wave=1)
    tree.add(second, [11, 12, 13], [-1.0, -1.0, -1.0], "pattern", wave=1)
    return tree


def logged_line(tree: SegmentTree, prompt: str, rewards: list[float | None], step: int = 0) -> dict[str, Any]:
    """A line of a training's tree log, in which advantages are rewards less 1/2."""
    advantages = [0.0 if reward is None else reward - 0.5 for reward in rewards]
    return {
        "step": step,
        "prompt": prompt,
        "rows": tree.leaves,
        "rewards": rewards,
        "advantages": advantages,
        "tree": tree.to_dict(),
    }


def sampled_line(tree: SegmentTree, prompt: str, completions: list[str], index: int = 0) -> dict[str, Any]:
    """A line of a file of `treepo-trl sample`."""
    return {
        "index": index,
        "prompt": prompt,
        "completions": completions,
        "weights": tree.leaf_weights(),
        "tree": tree.to_dict(),
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_run(folder: Path, steps: dict[int, list[dict[str, Any]]]) -> Path:
    """A run's folder with a file of the tree log for each step."""
    for step, lines in steps.items():
        write_lines(folder / "trees" / f"trees_{step:06d}.jsonl", lines)
    return folder
