"""The folder of `treepo-trl eval`: settings, samples of each column, results; one run at a time, and what it has."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from treepo_trl.command_line.tree_file import TreeFile, opened_output
from treepo_trl.sampling import SegmentTree
from treepo_trl.tree_log import SampledLine, read_trees

from .adapters import labels_of
from .arguments import EvalArguments


_SETTINGS, _RESULTS = "settings.json", "results.json"


@dataclass(frozen=True)
class EvalFolder:
    """An output folder that this run alone writes to."""

    path: Path
    files: Mapping[str, TreeFile]
    """The open file of each column."""

    def trees(self, column: str) -> dict[int, SegmentTree]:
        """The trees that a column's file has, by the index of their prompt."""
        lines = cast("Iterator[SampledLine]", read_trees(self.files[column].path))
        return {line["index"]: SegmentTree.from_dict(line["tree"]) for line in lines}

    def write_results(self, results: Mapping[str, object]) -> None:
        """Write the results, in place of older ones."""
        _write_json(self.path / _RESULTS, results)


@contextmanager
def opened_folder(
    arguments: EvalArguments, settings: dict[str, object], prompts: list[list[int]]
) -> Iterator[EvalFolder | None]:
    """
    The output folder, made if it is missing; `None` if none is asked for.

    Args:
        arguments ([`EvalArguments`]):
            Name the folder, the columns, and whether to resume.
        settings (`dict[str, object]`):
            What the samples depend on. Those of a folder that is resumed must be the same.
        prompts (`list[list[int]]`):
            Token ids of the prompts.

    Raises:
        ValueError: if the folder holds something and is not to be resumed, was sampled with other settings or from
            other prompts, or is written to by another run.
    """
    if arguments.output is None:
        yield None
        return
    path, adapters = Path(arguments.output), arguments.adapters or []
    if path.exists() and not path.is_dir():
        raise ValueError(f"`--output {path}` is a file. Name a folder.")
    is_used = path.is_dir() and any(file != _draft(path / _SETTINGS) for file in path.iterdir())
    if is_used and not arguments.resume:
        raise ValueError(f"`--output {path}` exists already. Remove it, name another folder, or add `--resume`.")
    labels = labels_of(adapters)
    about = {"settings": settings, "adapters": dict(zip(labels, map(_of_adapter, adapters), strict=True))}
    if is_used:
        about["adapters"] = _adapters_of_used(path, about) | about["adapters"]
    path.mkdir(parents=True, exist_ok=True)
    if not is_used:  # before the samples: a run that is killed in between can be resumed
        _write_json(path / _SETTINGS, about)
    with ExitStack() as stack:
        files = {
            column: stack.enter_context(opened_output(str(path / f"{column}.jsonl"), arguments.resume, prompts))
            for column in ["base"] * arguments.base + labels
        }
        if is_used:  # after the look at the samples: a run that is refused adds no adapters
            _write_json(path / _SETTINGS, about)
        yield EvalFolder(path, cast("dict[str, TreeFile]", files))


def _of_adapter(name: str) -> dict[str, str | None]:
    """Folder or hub id, and the hash of its weights: training on in one folder makes another adapter of it."""
    weights = next(iter(sorted(Path(name).glob("adapter_model.*"))), None)
    if weights is None:  # of the hub
        return {"name": name, "sha256": None}
    with weights.open("rb") as file:
        return {"name": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _adapters_of_used(path: Path, about: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The adapters of a folder that is resumed, after a look whether its samples are of the same settings."""
    file = path / _SETTINGS
    try:
        written = json.loads(file.read_bytes())
        settings, adapters = dict(written["settings"]), dict(written["adapters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--output {path}` is no folder of an evaluation: {file} cannot be read. Name another folder."
        ) from error
    # An adapter that is new, or that is not asked for again, has a file of its own.
    both = adapters.keys() & about["adapters"].keys()
    before = settings | {f"adapter {label}": adapters[label] for label in both}
    now = json.loads(json.dumps(about["settings"])) | {f"adapter {label}": about["adapters"][label] for label in both}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"`--output {path}` was sampled with `{name}` {before.get(name)!r}, and now it is {now.get(name)!r}. "
                "Set it as it was, or name another folder."
            )
    return adapters


def _draft(path: Path) -> Path:
    return path.with_suffix(".tmp")


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a file as a whole, so that a killed run leaves the old one or the new one."""
    draft = _draft(path)
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
