"""Files with trees, mutated: each is read as what stands in it, or refused by file and line."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treepo_trl.sampling import SegmentTree
from treepo_trl.tree_log import read_trees


FILES = 10_000
"""Mutated files in all, of both kinds."""

EDGES = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e999, -1e999, math.nan, "", "abc", "0"]
EDGES += ["<b>stop</b>", "stop", "length", "\ud800", "\0", [], [[]], [0], [-1], [0.5], ["0"], {}, {"0": 0}, [{}]]


def random_tree(rng: random.Random) -> SegmentTree:
    parents: list[int | None] = [None, *(rng.choice([None, *range(i)]) for i in range(1, rng.randint(1, 6)))]
    tree = SegmentTree([rng.randint(0, 99) for _ in range(rng.randint(1, 3))])
    for i, parent in enumerate(parents):
        tokens = [rng.randint(0, 99) for _ in range(rng.randint(1, 3))]
        logprobs = rng.choice([None, [-rng.random() for _ in tokens]])
        reason = None if i in parents[i + 1 :] else rng.choice(["stop", "pattern", "repetition", "length"])
        tree.add(parent, tokens, logprobs, reason, rng.choice([None, rng.random()]))
    return tree


def random_line(rng: random.Random, number: int, is_log: bool) -> dict[str, Any]:
    tree = random_tree(rng)
    prompt = rng.choice(["w1 w2", "Straße\n", '"quoted"'])
    if not is_log:
        completions = ["text" for _ in tree.leaves]
        line = {"index": number, "prompt": prompt, "completions": completions, "weights": tree.leaf_weights()}
    else:
        rewards = [rng.choice([None, 0.0, 1.0, -0.5]) for _ in tree.leaves]
        line = {
            "step": 3,
            "prompt": prompt,
            "rows": tree.leaves,
            "rewards": rewards,
            "advantages": [0.5] * len(rewards),
        }
    return json.loads(json.dumps({**line, "tree": tree.to_dict()}))


# Mutations of values, of the text of a line, and of lines


def containers(value: object) -> list[Any]:
    """A value and all that lies in it, as far as it can be changed."""
    if isinstance(value, dict):
        return [value, *(inner for each in value.values() for inner in containers(each))]
    if isinstance(value, list):
        return [value, *(inner for each in value for inner in containers(each))]
    return []


def place(rng: random.Random, line: dict[str, Any]) -> tuple[Any, Any]:
    """A container in a line, and a key or an index of it."""
    container = rng.choice([each for each in containers(line) if each])
    return container, rng.choice(list(container) if isinstance(container, dict) else range(len(container)))


def swap(rng: random.Random, line: dict[str, Any]) -> None:
    container, key = place(rng, line)
    container[key] = rng.choice(EDGES)


def nudge(rng: random.Random, line: dict[str, Any]) -> None:
    """Another number that could stand there, or a longer list."""
    container, key = place(rng, line)
    if isinstance(container[key], int | float):
        container[key] += rng.choice([-1, 1, 0.5])
    elif isinstance(container, list):
        container.append(container[key])


def drop(rng: random.Random, line: dict[str, Any]) -> None:
    container, key = place(rng, line)
    del container[key]


def rename(rng: random.Random, line: dict[str, Any]) -> None:
    records = [each for each in containers(line) if isinstance(each, dict) and each]
    record = rng.choice(records)
    key = rng.choice(list(record))
    record[rng.choice([key + "s", key.upper(), "entropy", "index", ""])] = record.pop(key)


def graft(rng: random.Random, line: dict[str, Any]) -> None:
    """A part of the line in the place of another."""
    container, key = place(rng, line)
    other, other_key = place(rng, line)
    container[key] = json.loads(json.dumps(other[other_key]))


def flip_bytes(rng: random.Random, text: bytes) -> bytes:
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'"{}[],:-0e.\\n'])
    return bytes(data)


def cut(rng: random.Random, text: bytes) -> bytes:
    start = rng.randrange(len(text))
    return text[:start] + text[start + rng.choice([1, 5, len(text)]) :]


def nest(rng: random.Random, text: bytes) -> bytes:
    depth = rng.choice([1, 50, 100_000])
    start = rng.randrange(len(text))
    return text[:start] + rng.choice([b"[", b'{"tree":']) * depth + text[start:]


def repeat_a_field(rng: random.Random, text: bytes) -> bytes:
    match = rng.choice(list(re.finditer(rb'"\w+": ', text)))
    return text[: match.start()] + match.group() + b"null, " + text[match.start() :]


def long_number(rng: random.Random, text: bytes) -> bytes:
    match = rng.choice(list(re.finditer(rb"\d+", text)))
    return text[: match.start()] + b"9" * rng.choice([20, 400, 5000]) + text[match.end() :]


VALUES: list[Callable[[random.Random, dict[str, Any]], None]] = [swap, swap, swap, nudge, drop, rename, graft]
TEXTS = [flip_bytes, flip_bytes, cut, nest, repeat_a_field, long_number]


def mutated(rng: random.Random) -> bytes:
    is_log = rng.random() < 0.5
    records = [random_line(rng, number, is_log) for number in range(rng.randint(1, 3))]
    kind = rng.choice(["value", "value", "text", "lines"])
    if kind == "value":
        rng.choice(VALUES)(rng, rng.choice(records))
    lines = [json.dumps(record).encode() for record in records]
    i = rng.randrange(len(lines))
    if kind == "text":
        lines[i] = rng.choice(TEXTS)(rng, lines[i])
    elif kind == "lines":
        other = json.dumps(random_line(rng, rng.choice([0, 1, 9]), rng.random() < 0.5)).encode()
        lines[i:i] = [rng.choice([lines[i], lines[-1], other, b"", b"null", b"# a note", b"\xff\xfe"])]
    ending = rng.choice([b"\n", b"\n", b"", b"\r\n"])
    return b"\n".join(lines) + ending


# What must hold


def check_tree(record: Any) -> None:
    """The invariants of a tree, and that it is what stands in the file."""
    tree = SegmentTree.from_dict(record)
    plain = {**record, "nodes": [{k: v for k, v in n.items() if (k, v) != ("entropy", None)} for n in record["nodes"]]}
    assert json.dumps(tree.to_dict(), sort_keys=True) == json.dumps(plain, sort_keys=True)
    assert [i for i, node in enumerate(tree.nodes) if node.finish_reason is not None] == sorted(tree.leaves)
    assert math.isclose(sum(tree.leaf_weights()), bool(tree.leaves))
    for i, node in enumerate(tree.nodes):
        assert node.token_ids
        assert node.parent is None or (0 <= node.parent < i and i in tree.nodes[node.parent].children)
        assert bool(node.children) == (node.finish_reason is None)
        assert node.logprobs is None or (
            len(node.logprobs) == len(node.token_ids) and all(map(math.isfinite, node.logprobs))
        )
    for leaf in tree.leaves:
        assert len(tree.completion_ids(leaf)) == tree.nodes[leaf].end


def as_pairs(text: str) -> Any:
    return json.loads(text, object_pairs_hook=list)


def read(path: Path, content: bytes) -> str | None:
    """Why a file is refused; `None` if it is read as what stands in it."""
    path.unlink(missing_ok=True)  # to overwrite a file takes longer, on some file systems
    path.write_bytes(content)
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    records, refusal = [], None
    try:
        for record in read_trees(path):
            records.append(record)
    except ValueError as error:
        refusal = str(error)
    for record, line in zip(records, lines, strict=False):
        # Decoded first: `json` would guess another encoding. As pairs: it would take the last of two fields.
        assert json.dumps(as_pairs(json.dumps(record))) == json.dumps(as_pairs(line.decode()))
        check_tree(record["tree"])
    indices = [record["index"] for record in records if "index" in record]
    assert len(indices) == len(set(indices))
    if refusal is None:
        assert len(records) == len(lines)
    else:
        assert re.match(rf"{re.escape(str(path))}, line {len(records) + 1}: \S", refusal), refusal
        assert len(refusal) < 400 + len(str(path))
    return refusal


def test_a_mutated_file_is_read_as_what_stands_in_it_or_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    refused = 0
    for seed in range(FILES):
        content = mutated(random.Random(seed))
        try:
            refused += read(path, content) is not None
        except BaseException as error:
            error.add_note(f"seed {seed}: {content!r:.2000}")
            raise
    assert FILES / 2 < refused < FILES  # some mutations change nothing that matters, such as a digit of a reward


@pytest.mark.parametrize("is_log", [False, True])
def test_a_file_as_it_was_written_is_read(tmp_path: Path, is_log: bool) -> None:
    rng = random.Random(0)
    lines = [json.dumps(random_line(rng, number, is_log)) for number in range(100)]
    assert read(tmp_path / "trees.jsonl", "\n".join(lines).encode()) is None
