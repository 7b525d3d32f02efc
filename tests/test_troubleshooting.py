"""docs/troubleshooting.md: the messages on it are those of the code, of this package and of others."""

import ast
import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest
from trl import ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from tests.support.paths import ROOT
from treepo_trl import TreePOConfig


DOCS = ROOT / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OWN, OTHERS = "## Messages of treepo-trl", "## Messages of other libraries"

_CODE = re.compile(r"`` (.+?) ``")


def message_of(node: ast.expr) -> str | None:
    """A text as users see it, with `…` for what differs; `None` for what is no text, or has no words of its own."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[sr]", "…", node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    else:
        return None
    return text if re.search(r"[A-Za-z]{2}", text.replace("…", "")) else None


def texts_of(path: Path) -> str:
    """Every text in a file of code, with a zero between two of them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = (message_of(node) for node in ast.walk(tree) if isinstance(node, ast.expr))
    return "\0".join(dict.fromkeys(text for text in texts if text is not None))


def matches(entry: str, message: str) -> bool:
    """Whether the parts of an entry, between its dots, stand in a message one after the other, without a zero."""
    return re.search("[^\0]*".join(map(re.escape, entry.split("..."))), message) is not None


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the tables from a heading of the second level to the next one."""
    part = PAGE.partition(heading)[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `` ")]


def entries_of(cell: str) -> list[str]:
    return _CODE.findall(cell)


ENTRIES = [entry for row in rows_below(OWN) for entry in entries_of(row[0])]


def test_parts_of_a_message_are_found_in_their_order() -> None:
    assert matches("`a` is ...", "`a` is ….")
    assert not matches("is ... `a`", "`a` is ….")


def test_every_row_is_a_message() -> None:
    every_text = "\0".join(map(texts_of, SOURCES))  # not of the messages alone: some are put together from other texts
    gone = [entry for entry in ENTRIES if not matches(entry, every_text)]
    assert gone == [], "These texts are no longer in the code."


def test_rows_have_cause_and_remedy() -> None:
    assert all(len(row) == 3 and all(row) for row in rows_below(OWN))
    assert all(len(row) == 4 and all(row) for row in rows_below(OTHERS))


@pytest.mark.parametrize("row", [row for row in rows_below(OTHERS) if row[2].endswith(".py`")], ids=lambda row: row[0])
def test_the_text_of_another_package_is_in_its_file(row: list[str]) -> None:
    package, _, name = row[2].strip("`").partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    assert matches(entries_of(row[0])[0], texts_of(Path(found.submodule_search_locations[0]) / name))


def settings() -> set[str]:
    """Names that a config file or the command line takes."""
    sources = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    declared = set(re.findall(r'^    (\w+): |"--(\w+)"', sources, re.MULTILINE))
    own = {name for pair in declared for name in pair if name}
    return own | {each.name for group in (TreePOConfig, ModelConfig, GRPOScriptArguments) for each in fields(group)}


@pytest.mark.parametrize("page", ["troubleshooting.md", "from-grpotrainer.md"])
def test_settings_in_advice_exist(page: str) -> None:
    text = _CODE.sub("", (DOCS / page).read_text(encoding="utf-8"))
    named = re.findall(r"`(?:treepo-trl \w+ )?--(\w+)(?![-\w])|`(\w+)(?:: [^`]+|=[^`]+)`", text)
    names = {name for pair in named for name in pair if name and not name.isupper()}  # no environment variables
    assert len(names) > 3
    assert names - settings() == set()


def test_settings_to_start_with_exist() -> None:
    table = (DOCS / "choosing-settings.md").read_text(encoding="utf-8").partition("\n## Learning rate")[0]
    names = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert len(names) > 8
    assert names - settings() == set()
