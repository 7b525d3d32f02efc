"""Commands and snippets of README and docs: the parsers take them, and their names exist."""

import ast
import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command_lines import ON_A_PROCESSOR, check_command, check_treepo_trl, commands_of
from tests.support.pages import BLOCKS, PAGES, Block, blocks_of, name_of
from tests.support.paths import ROOT
from treepo_trl.command_line.arguments import make_parser
from treepo_trl.command_line.examples import EXAMPLES


def of(language: str) -> list[Any]:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.language == language]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder like the repository's, with the files that readers are said to have."""
    for name in ("examples", "docs", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("recipe.yaml", "config.yaml", "FILE"):
        shutil.copy(ROOT / "src/treepo_trl/quickstart/recipe.yaml", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("block", of("sh"))
def test_parsers_take_the_options_of_a_page(block: Block) -> None:
    commands = commands_of(block.text)
    assert commands, "a block without a command"
    for words in commands:
        check_command(words)


def inline_commands() -> list[Any]:
    """`treepo-trl` with its options, in the text of pages."""
    found = {}
    for page in PAGES:
        for command in re.findall(r"`(treepo-trl [^`]+ --[^`]+)`", page.read_text(encoding="utf-8")):
            found.setdefault(command, name_of(page))
    return [pytest.param(command, id=f"{page}: {command}") for command, page in found.items()]


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("command", inline_commands())
def test_parsers_take_the_options_of_a_sentence(command: str) -> None:
    for words in commands_of(command):
        check_treepo_trl(words[1:])


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("command", EXAMPLES)
def test_parsers_take_the_examples_of_help(command: str) -> None:
    for words in commands_of(EXAMPLES[command].partition("\n")[2]):
        check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "treepo-trl view outputs/run --no_such_option 1",
        "treepo-trl train --config gone.yaml",
        "treepo-trl doctor --no_such_option 1",
        "python -m benchmarks.rollout --no_such_option",
        "python -m benchmarks.gone",
        "python examples/scripts/gone.py",
        "make gone",
        'pip install "treepo-trl[gone]"',
        "sudo reboot",
    ],
)
@pytest.mark.usefixtures("reader")
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(commands_of(command)[0])


@pytest.mark.parametrize("block", of("yaml"))
def test_settings_of_a_page_are_settings(block: Block, tmp_path: Path) -> None:
    """A part of a recipe is one; a whole file names what the parsers take."""
    assert isinstance(yaml.safe_load(block.text), dict)
    file = tmp_path / "recipe.yaml"
    file.write_text(block.text)
    make_parser().parse_args_and_config(["--config", str(file), "--output_dir", "out", *ON_A_PROCESSOR])


def names_of(tree: ast.AST) -> dict[str, object]:
    """What a snippet imports. A package that is not installed here is left out."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            for alias in node.names:
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def wrong_keywords(tree: ast.AST, names: dict[str, object]) -> list[str]:
    """Keywords of calls of imported names that these do not take."""
    wrong = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = names.get(getattr(call.func, "id", ""))
        if not callable(called):
            continue
        parameters = inspect.signature(called).parameters
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        wrong += [
            f"{ast.unparse(call.func)}({keyword.arg}=...)"
            for keyword in call.keywords
            if keyword.arg is not None and keyword.arg not in parameters and not takes_all
        ]
    return wrong


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}), ids=name_of)
def test_names_of_python_snippets_exist(page: Path) -> None:
    """Names of earlier blocks of a page serve its later ones, and a name of this package needs no import there."""
    names: dict[str, object] = {}
    for block in blocks_of(page):
        if block.language == "python":
            tree = ast.parse(block.text, block.name)
            names |= names_of(tree)
            assert wrong_keywords(tree, public_names() | names) == []


def public_names() -> dict[str, object]:
    package = importlib.import_module("treepo_trl")
    return {name: getattr(package, name) for name in package.__all__}


def test_a_wrong_keyword_is_found() -> None:
    tree = ast.parse("TreePOConfig(num_generation=4, output_dir='x')")
    assert wrong_keywords(tree, public_names()) == ["TreePOConfig(num_generation=...)"]
