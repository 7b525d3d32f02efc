"""Which files a user means by the names of runs, folders and files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from treepo_trl.preflight import require_run
from treepo_trl.tree_log import SampledLine, TreeLogLine, read_trees


_LOG_FILES = "trees_*.jsonl"


@dataclass
class Source:
    """Trees that belong together: those of a run, or of an output of `treepo-trl sample`."""

    name: str
    """As the user has written it."""
    files: list[Path]
    """In the order of steps."""
    folders: list[Path] = field(default_factory=list)
    """Where its tokenizer may be, the best place first."""

    def lines(self) -> Iterator[TreeLogLine | SampledLine]:
        """
        The lines of all files, each checked.

        Raises:
            ValueError: at a line that is no tree, as `read_trees` does, and if there is no line at all.
        """
        is_empty = True
        for file in self.files:
            for line in read_trees(file):
                is_empty = False
                yield line
        if is_empty:
            raise ValueError(f"`{self.name}` holds no trees: {_files(self.files)} empty.")

    def tokenizer_folder(self) -> Path | None:
        """The folder that holds the tokenizer of the run: its own, else that of its last checkpoint."""
        for folder in self.folders:
            if (folder / "tokenizer_config.json").is_file():
                return folder
        return None


def find_sources(names: Iterable[str]) -> list[Source]:
    """
    The sources that names stand for: runs, folders with the files of a tree log, and files.

    Files of one tree log that follow each other are one source, so that `RUN/trees/*.jsonl` is one.

    Raises:
        ValueError: if a name is that of nothing, of a folder without a tree log, or is given twice.
    """
    sources: list[Source] = []
    for name in names:
        path = require_run(name)
        if path.is_dir():
            sources.append(_run(name, path))
        elif sources and _are_one_log(sources[-1].files[-1], path):
            sources[-1].files.append(path)
            sources[-1].name = str(path.parent)
        else:
            sources.append(Source(name, [path], _tokenizer_folders(path.parent.parent)))
    given = [file.resolve() for source in sources for file in source.files]
    twice = next((file for i, file in enumerate(given) if file in given[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice. Name each run and each file once.")
    return sources


def _run(name: str, folder: Path) -> Source:
    files = sorted((folder / "trees").glob(_LOG_FILES))
    if files:
        return Source(name, files, _tokenizer_folders(folder))
    files = sorted(folder.glob(_LOG_FILES))
    if files:
        return Source(name, files, _tokenizer_folders(folder.parent))
    raise ValueError(
        f"`{name}` has no tree log: no `trees/{_LOG_FILES}` is in it. A training writes one with `log_trees: true`."
    )


def _are_one_log(file: Path, other: Path) -> bool:
    return file.parent == other.parent and file.match(_LOG_FILES) and other.match(_LOG_FILES)


def _tokenizer_folders(run: Path) -> list[Path]:
    checkpoints = [(int(number), path) for path in run.glob("checkpoint-*") if (number := path.name[11:]).isdecimal()]
    return [run, *(path for _, path in sorted(checkpoints, reverse=True))]


def _files(files: list[Path]) -> str:
    return f"{files[0]} is" if len(files) == 1 else f"its {len(files)} files are"
