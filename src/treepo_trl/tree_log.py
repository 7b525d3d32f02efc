"""Trees in files: the tree log of a training in `output_dir/trees`, and a reader of it and of `treepo-trl sample`."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict, cast

from .sampling.json_lines import (
    COUNT,
    NUMBER,
    TEXT,
    append,
    check_fields,
    check_list,
    check_value,
    or_null,
    parse_line,
)
from .sampling.nodes import TreeRecord
from .sampling.tree import SegmentTree


logger = logging.getLogger(__name__)

_failing: set[str] = set()  # folders whose last log was lost: a full disk is said once, not at every step


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


class SampledLine(TypedDict):
    """A line of the output of `treepo-trl sample`."""

    index: int
    """Number of the prompt, from 0 on. A file has it once."""
    prompt: str
    """Text of the prompt."""
    completions: list[str]
    """Text of each leaf."""
    weights: list[float]
    """`leaf_weights` of the tree."""
    tree: TreeRecord
    """`SegmentTree.from_dict` reads it."""


def tree_records(
    step: int,
    trees: list[SegmentTree],
    rewards: list[list[float]],
    advantages: Sequence[Sequence[float | list[float]]],
    decode: Callable[[list[int]], str],
) -> list[TreeLogLine]:
    """
    A record per tree.

    Args:
        step (`int`):
            Global step before which the trees were sampled.
        trees (`list[SegmentTree]`):
            Trees of the batch.
        rewards (`list[list[float]]`):
            Reward of each leaf of each tree, `nan` if it could not be scored.
        advantages (sequence of sequences of `float` or `list[float]`):
            Of each leaf of each tree, or of each of its tokens: the record has that of the last one.
        decode (`Callable[[list[int]], str]`):
            Text of a list of tokens.
    """
    records: list[TreeLogLine] = []
    for tree, *values in zip(trees, rewards, advantages, strict=True):
        ends = [tree.nodes[leaf].end for leaf in tree.leaves]
        rows = list(zip(ends, *values, strict=True))
        records.append(
            {
                "step": step,
                "prompt": decode(tree.prompt_ids),
                "rows": tree.leaves,
                "rewards": [None if math.isnan(reward) else reward for _, reward, _ in rows],
                "advantages": [each[end - 1] if isinstance(each, list) else each for end, _, each in rows],
                "tree": tree.to_dict(),
            }
        )
    return records


def write_trees(records: list[TreeLogLine], output_dir: str, step: int, is_first: bool) -> None:
    """
    Write records to `output_dir/trees/trees_<step>.jsonl`.

    The first batch of a step starts the file anew, since a resumed training writes its steps again. A log that cannot
    be written is a warning: the training is worth more.
    """
    folder = os.path.join(output_dir, "trees")
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"trees_{step:06d}.jsonl"), "wb" if is_first else "ab", buffering=0) as file:
            append(file, data)
    except OSError as error:
        if folder not in _failing:
            logger.warning(
                f"The trees of step {step} are lost: {error.strerror or error}. `log_trees` writes them to {folder}. "
                "The training goes on without them, and each later step is tried again, without another warning."
            )
        _failing.add(folder)
    else:
        _failing.discard(folder)


def logged_steps(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Step and file of each step in a training's tree log, in the order of steps."""
    files = [path for path in Path(output_dir, "trees").glob("trees_*.jsonl") if path.stem[6:].isdecimal()]
    return sorted((int(path.stem[6:]), path) for path in files)


def read_trees(path: str | Path) -> Iterator[TreeLogLine | SampledLine]:
    """
    The lines of a tree log, or of an output of `treepo-trl sample`, each checked.

    Raises:
        ValueError: naming file, line and field, at the first line that neither of them has written.
    """
    with open(path, "rb") as file:
        yield from checked_lines(file, path)


def checked_lines(lines: Iterable[bytes], path: str | Path) -> Iterator[TreeLogLine | SampledLine]:
    """`read_trees` for lines of an open file; `path` is its name in errors."""
    line_of: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_line(line)
            if isinstance(record, dict) and "index" in record:
                index = _check_sampled(cast(SampledLine, record))
                if index in line_of:
                    raise ValueError(f"`index` is {index}, as in line {line_of[index]}: a file has each prompt once.")
                line_of[index] = number
            else:
                _check_logged(cast(TreeLogLine, record))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield cast("TreeLogLine | SampledLine", record)


def _check_sampled(line: SampledLine) -> int:
    check_fields(line, "the line", SampledLine.__required_keys__)
    check_value(line["index"], "index", COUNT)
    check_list(line["completions"], "completions", TEXT)
    check_list(line["weights"], "weights", NUMBER)
    _check_tree(line, ("completions", "weights"))
    return line["index"]


def _check_logged(line: TreeLogLine) -> None:
    check_fields(line, "the line", TreeLogLine.__required_keys__)
    check_value(line["step"], "step", COUNT)
    check_list(line["rows"], "rows", COUNT)
    check_list(line["rewards"], "rewards", or_null(NUMBER))
    check_list(line["advantages"], "advantages", NUMBER)
    leaves = _check_tree(line, ("rows", "rewards", "advantages")).leaves
    if sorted(line["rows"]) != sorted(leaves):
        raise ValueError("`rows` names other nodes than `leaves` of the tree.")


def _check_tree(line: TreeLogLine | SampledLine, per_leaf: tuple[str, ...]) -> SegmentTree:
    """Check what both kinds of lines have: the prompt's text, and a tree that is done, with values for each leaf."""
    check_value(line["prompt"], "prompt", TEXT)
    tree = SegmentTree.from_dict(line["tree"])
    for i, node in enumerate(tree.nodes):
        if node.finish_reason is None and not node.children:
            raise ValueError(f"`nodes[{i}]` has neither a finish reason nor children.")
    for name in per_leaf:
        if len(line[name]) != len(tree.leaves):
            raise ValueError(f"`{name}` has {len(line[name])} values, and the tree {len(tree.leaves)} leaves.")
    return tree
