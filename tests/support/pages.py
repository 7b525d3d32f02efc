"""The code blocks of Markdown pages and the cells of notebooks, and what runs them in order."""

import doctest
import io
import re
import subprocess
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.command_lines import commands_of
from tests.support.paths import ROOT
from treepo_trl.cli import main


_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not run: (.+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    """`python`, `sh`, `yaml` and others; empty if the fence names none."""
    text: str
    why_not_run: str | None
    """What a comment `<!-- not run: reason -->` above the block says."""

    @property
    def name(self) -> str:
        """The place, as an editor opens it."""
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """Its path from the root."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text, 0, match.start())
        line = text.count("\n", 0, match.start()) + 2
        blocks.append(Block(page, line, match[1], match[2], mark and mark[1]))
    return blocks


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]


class Runner:
    """
    Runs code in one namespace and in the working folder, as a reader does who copies one piece after the other.

    `treepo-trl` runs in this process, which spares each command the seconds that its libraries take to load.

    Args:
        changes (`Mapping[str, str]`):
            What is replaced in every piece, to make it short. Each must occur; see `unused`.
    """

    def __init__(self, changes: Mapping[str, str] | None = None) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.changes = dict(changes or {})
        self.unused = set(self.changes)
        self.printed = ""

    def run_block(self, block: Block) -> None:
        """Run a block, write it to the file that its first line names, or compare it with what was printed last."""
        text = self._changed(block.text)
        if block.language == "python":
            self.python(text, block.name)
        elif block.language == "sh":
            self.shell(text)
        elif block.language == "yaml":
            first = text.partition("\n")[0]
            Path(first.removeprefix("# ")).write_text(text)
        elif block.language == "text":
            is_same = doctest.OutputChecker().check_output(text, self.printed, doctest.ELLIPSIS)
            assert is_same, f"{block.name} says\n{text}\nand this was printed:\n{self.printed}"

    def python(self, code: str, name: str) -> None:
        """
        Run Python code, or the code of a notebook's cell.

        There a line that begins with `!` is a command with the values of `{names}`, and `%%writefile` writes the cell.
        """
        if code.startswith("%%writefile "):
            first, _, text = code.partition("\n")
            Path(first.split()[1]).write_text(text)
            return
        self.names["_shell"] = self.shell
        code = re.sub(r"^( *)!(.+)$", r"\1_shell(fr'''\2''')", re.sub(r"\\\n\s*", " ", code), flags=re.MULTILINE)
        with redirect_stdout(io.StringIO()) as stream:
            exec(compile(code, name, "exec"), self.names)
        self.printed = stream.getvalue()

    def shell(self, script: str) -> None:
        """Run the commands of a script, one after the other."""
        with redirect_stdout(io.StringIO()) as stream:
            for words in commands_of(script):
                if words[0] == "treepo-trl":
                    main(words[1:])
                else:
                    stream.write(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        self.printed = stream.getvalue()

    def _changed(self, text: str) -> str:
        for old, new in self.changes.items():
            if old in text:
                self.unused.discard(old)
                text = text.replace(old, new)
        return text
