"""Commands and snippets of README and docs: the parsers take them, their names exist, and what can run here does."""

import ast
import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from tests.support.command_lines import ON_A_PROCESSOR, check_command, check_treepo_trl, commands_of
from tests.support.pages import Block, Runner, blocks_of
from tests.support.paths import ROOT
from treepo_trl.commands.arguments import make_parser
from treepo_trl.commands.examples import EXAMPLES


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]

RUN_ELSEWHERE = {
    "docs/tutorial.md": "tests/test_tutorial.py",
    "docs/new-engine.md": "tests/engines/test_new_engine.py",
}
"""Pages whose snippets a test runs in order."""

WHY_NOT_RUN = {
    "needs the hub": r"\b[A-Z][\w-]+/[\w.-]*\d+(\.\d+)?[BMK]\b|trl-lib/|gsm8k|math500|\baime\b|git clone|openenv-core",
    "needs a card of its own": r"cli_configs/|gpu[-_]report|--card_gib",
    "needs a model, data or a run of the reader's": (
        r"\b(MODEL|RUN|NAME|FILE)\b|outputs/|\bmy[-_]|prompts\.jsonl|recipe\.yaml|=\.\.\."
    ),
    "takes minutes": r"-m benchmarks\.|make |quickstart|doctor",
    "needs a trainer": r"\btrainer\.",
    "installs or shows": r"pip install|trackio|GenericEnvClient|docker|uv ",
}
"""Why a snippet does not run in a test, by what is in it. A page can also say so: `<!-- not run: reason -->`."""


def of(language: str) -> list[Any]:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.language == language]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder like the repository's, with the files that readers are said to have."""
    for name in ("examples", "docs", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "src/treepo_trl/quickstart/recipe.yaml", tmp_path / "recipe.yaml")
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
            found.setdefault(command, page.relative_to(ROOT).as_posix())
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
        "python -m benchmarks.leaf_bias --no_such_option",
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


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))])
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


@pytest.mark.parametrize("block", [*of("sh"), *of("python")])
def test_what_does_not_run_has_a_reason(block: Block) -> None:
    page = block.page.relative_to(ROOT).as_posix()
    if page in RUN_ELSEWHERE or page in RUN_HERE or block.why_not_run:
        return
    reasons = [reason for reason, pattern in WHY_NOT_RUN.items() if re.search(pattern, block.text)]
    assert reasons, f"{block.name} can run here: add it to a test, or `<!-- not run: reason -->` above it."


RUN_HERE = {
    "README.md": {
        '"Qwen/Qwen2.5-0.5B-Instruct"': "model_folder",
        'load_dataset("trl-lib/DeepMath-103K", split="train")': "tasks",
        "TreePOConfig(": "TreePOConfig(use_cpu=True, bf16=False, max_steps=1, max_completion_length=8, report_to=[], ",
    },
    "docs/sample-without-training.md": {
        '"Qwen/Qwen2.5-0.5B-Instruct"': "model_folder",
        "max_completion_length=512": "max_completion_length=16",
    },
}
"""Pages whose Python runs on a tiny model, and what is replaced for that."""


@pytest.mark.parametrize("page", RUN_HERE)
def test_python_of_a_page_runs(page: str, tiny_model_dir: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = [{"role": "user", "content": "w1 w2"}]
    runner = Runner(RUN_HERE[page])
    runner.names |= {
        "model_folder": tiny_model_dir,
        "tasks": Dataset.from_dict({"prompt": [prompt] * 8, "solution": ["$1$"] * 8}),
    }
    if page == "docs/sample-without-training.md":  # its first snippet reads what the command above it writes
        runner.shell(
            f"treepo-trl sample --model_name_or_path {tiny_model_dir} --engine transformers "
            f"--dataset_name {data(tmp_path)} --output trees.jsonl --num_generations 2 --max_completion_length 4"
        )
    for block in blocks_of(ROOT / page):
        if block.language == "python":
            runner.run_block(block)
    assert runner.unused == set()


def data(folder: Path) -> str:
    file = folder / "two.jsonl"
    file.write_text('{"prompt": "w1"}\n{"prompt": "w2"}\n')
    return str(file)
