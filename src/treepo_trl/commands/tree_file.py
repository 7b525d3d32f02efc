"""The JSONL file of `treepo-trl sample`: a tree a line, and which prompts a file has already."""

import json
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from treepo_trl.sampling import SegmentTree


_LINE_START = b'{"index": '  # as `write_tree` writes it


def write_tree(file: TextIO, index: int, tree: SegmentTree, tokenizer: PreTrainedTokenizerBase) -> None:
    """Append a tree as one JSON line: index and text of the prompt, texts and weights of the leaves, the tree."""
    record = {
        "index": index,
        "prompt": tokenizer.decode(tree.prompt_ids, skip_special_tokens=False),
        "completions": [tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True) for leaf in tree.leaves],
        "weights": tree.leaf_weights(),
        "tree": tree.to_dict(),
    }
    file.write(json.dumps(record) + "\n")
    file.flush()


def finished_prompts(output: str | None, resume: bool, prompts: list[list[int]]) -> set[int]:
    """
    Indices of the prompts whose trees the file holds; a last line that was cut off is removed from it.

    Makes the file and its folder if they are missing, so that a run does not fail at its first tree. Of a line it
    reads the index and the token ids of the prompt alone, which every version has written.

    Raises:
        ValueError: if the file holds anything and is not to be resumed, or holds something else than trees of these
            prompts.
    """
    if output is None:
        return set()
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    done: set[int] = set()
    with path.open("a+b") as file:
        file.seek(0)
        for line in iter(file.readline, b""):
            if not resume:
                raise ValueError(f"`--output {path}` exists already. Remove it, name another file, or add `--resume`.")
            if not line.endswith(b"\n") and line.startswith(_LINE_START[: len(line)]):
                file.truncate(file.tell() - len(line))  # a dying process did not finish it
                break
            done.add(_prompt_of_line(path, line, prompts))
    return done


def _prompt_of_line(path: Path, line: bytes, prompts: list[list[int]]) -> int:
    try:
        record = json.loads(line)
        index, prompt_ids = record["index"], record["tree"]["prompt_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--output {path}` has a line that is no tree of this command: {line!r:.80}. Name another file."
        ) from error
    if not isinstance(index, int) or not 0 <= index < len(prompts) or prompt_ids != prompts[index]:
        raise ValueError(
            f"`--output {path}` holds a tree of another prompt {index!r}: it is from another run. Name another file."
        )
    return index
