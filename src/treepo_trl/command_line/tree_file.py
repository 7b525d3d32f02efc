"""The JSONL file of `treepo-trl sample`: a tree a line, one run at a time, and which prompts it has already."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from treepo_trl.file_lock import lock
from treepo_trl.sampling import SegmentTree
from treepo_trl.sampling.json_lines import append
from treepo_trl.tree_log import SampledLine, checked_lines


_LINE_START = b'{"index": '  # as `TreeFile.write` writes it


class OutputError(OSError):
    """A tree could not be kept. The message is for the user."""


class TreeFile:
    """
    An output file that this run alone writes to.

    Args:
        path (`Path`):
            Name of the file in errors.
        file (`FileIO`):
            The file, open for appending without a buffer.
        done (`set[int]`):
            Indices of the prompts whose trees it holds.
    """

    def __init__(self, path: Path, file: FileIO, done: set[int]) -> None:
        self.path = path
        self.done = done
        self._file = file

    def write(self, index: int, tree: SegmentTree, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Append a tree as one JSON line: index and text of the prompt, texts and weights of the leaves, the tree.

        Raises:
            OutputError: if the line cannot be written. The file then ends with the line before.
        """
        completions = [tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True) for leaf in tree.leaves]
        record: SampledLine = {
            "index": index,
            "prompt": cast(str, tokenizer.decode(tree.prompt_ids, skip_special_tokens=False)),
            "completions": cast("list[str]", completions),
            "weights": tree.leaf_weights(),
            "tree": tree.to_dict(),
        }
        with _output_errors(self.path):
            append(self._file, json.dumps(record).encode() + b"\n")


@contextmanager
def opened_output(output: str | None, resume: bool, prompts: list[list[int]]) -> Iterator[TreeFile | None]:
    """
    The output file, with a last line that was cut off removed; `None` if none is asked for.

    Makes the file and its folder if they are missing, so that a run does not fail at its first tree.

    Raises:
        ValueError: if another run writes to the file, if it holds anything and is not to be resumed, or if it holds
            something else than trees of these prompts.
    """
    if output is None:
        yield None
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    try:
        if not file.seekable():
            raise ValueError(f"`--output {path}` is a pipe or a terminal. Name a file.")
        _lock(file, path)
        yield TreeFile(path, file, _finished_prompts(file, path, resume, prompts))
    except BaseException:
        with suppress(OSError):  # the first error is the one to see
            file.close()
        raise
    with _output_errors(path):  # some network file systems say only now that a disk is full
        file.close()


def _lock(file: FileIO, path: Path) -> None:
    """Keep other runs from the file until it is closed, or the process is gone, however it ends."""
    try:
        lock(file.fileno())
    except BlockingIOError:
        raise ValueError(f"Another run writes to `--output {path}`. Wait for its end, or name another file.") from None
    except OSError as error:
        print(f"{path} cannot be locked ({error}): start no other run with this `--output`.", file=sys.stderr)


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        room = ""
        with suppress(OSError):
            room = f" Its disk has {shutil.disk_usage(path.parent).free / 2**30:.2f} GiB free."
        raise OutputError(f"`--output {path}` cannot be written: {error.strerror or error}.{room}") from error


def _finished_prompts(file: FileIO, path: Path, resume: bool, prompts: list[list[int]]) -> set[int]:
    """Indices of the prompts whose trees the file holds; a last line that was cut off is removed from it."""
    done: set[int] = set()
    if os.fstat(file.fileno()).st_size == 0:  # a device too: what it gives has no end
        return done
    if not resume:
        raise ValueError(f"`--output {path}` exists already. Remove it, name another file, or add `--resume`.")
    with path.open("rb") as lines:
        try:
            for number, line in enumerate(checked_lines(_whole_lines(lines, file), path), start=1):
                index = cast("SampledLine", line).get("index", len(prompts))
                if index >= len(prompts) or line["tree"]["prompt_ids"] != prompts[index]:
                    raise ValueError(f"{path}, line {number}: it is a tree of other prompts than those of this run.")
                done.add(index)
        except ValueError as error:
            raise ValueError(f"{error} Remove the line to resume from the others, or name another file.") from error
    return done


def _whole_lines(lines: BufferedReader, file: FileIO) -> Iterator[bytes]:
    """The lines of a file, but a last one that a dying process did not finish: that is cut off."""
    for line in lines:
        if not line.endswith(b"\n") and line.startswith(_LINE_START[: len(line)]):
            file.truncate(lines.tell() - len(line))
            return
        yield line
