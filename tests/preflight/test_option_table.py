"""A command's options as data: the same help, the same errors, made anew where they no longer hold."""

import importlib
import json
import os
from pathlib import Path

import pytest

from treepo_trl.cli import COMMANDS
from treepo_trl.preflight import option_table
from treepo_trl.preflight.option_table import as_data, as_parser, load_table, save_table, table_file


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_that_of_the_parser(command: str) -> None:
    module = importlib.import_module(COMMANDS[command][1])
    for name in ("command_parser", "help_parser"):
        if hasattr(module, name):
            parser = getattr(module, name)()
            kept = as_parser(json.loads(json.dumps(as_data(parser))))
            assert kept.format_help() == parser.format_help()


def test_choices_are_checked_as_the_parser_checks_them(capsys: pytest.CaptureFixture[str]) -> None:
    from treepo_trl.apps.train.command import command_parser

    parser = command_parser()
    kept = as_parser(as_data(parser))
    for arguments in (["--branch_schedule", "wide"], ["--learning_rate"]):
        said = []
        for each in (parser, kept):
            with pytest.raises(SystemExit):
                each.parse_args(arguments)
            said.append(capsys.readouterr().err.splitlines()[-1])
        assert said[0] == said[1]


TRIED: list[list[str]] = [["none"], ["null"], ["1"], ["0.5"], ["a"], ["1", "2"], ["true"], []]


@pytest.mark.parametrize("command", ["train", "plan", "sample", "eval", "doctor"])
def test_what_the_parser_takes_is_taken(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A switch takes a value or none, a list many."""
    parser = importlib.import_module(COMMANDS[command][1]).command_parser()
    kept = as_parser(json.loads(json.dumps(as_data(parser))))
    num_taken = 0
    for action in parser._actions:
        for values in (*TRIED, *([choice] for choice in action.choices or ())):
            words = [*action.option_strings[:1], *map(str, values)]
            if action.dest == "help" or not action.option_strings:
                continue
            try:
                parser.parse_args(words)
            except SystemExit:
                continue
            kept.parse_args(words)
            num_taken += 1
    assert num_taken > 50
    capsys.readouterr()


def test_a_table_is_kept_and_a_broken_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from treepo_trl.apps.view.command import command_parser

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = table_file("view")
    assert load_table(file) is None
    file.parent.mkdir(parents=True)
    old, other = file.with_name("view-0123456789abcdef.json"), file.with_name("view-123456789abcdef0.json")
    old.touch()
    other.touch()
    os.utime(old, (0, 0))
    parser = command_parser()
    save_table(file, parser, parser)
    kept = load_table(file)
    assert kept is not None
    assert kept[0].format_help() == parser.format_help()
    assert {*file.parent.iterdir()} == {file, other}  # that of another environment stays
    for broken in ("", "{", "[]", '{"help": {}}', '{"help": {}, "options": {}}'):
        file.write_text(broken)
        assert load_table(file) is None


def test_other_versions_have_other_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table_file("train") == table_file("train") != table_file("plan")
    files = []
    for changed in (None, "treepo-trl", "trl", "transformers", "accelerate"):
        monkeypatch.setattr(option_table, "version", lambda name, changed=changed: "2" if name == changed else "1")
        files.append(table_file("train"))
    assert len(set(files)) == 5


@pytest.mark.parametrize("is_there", [False, True])
def test_without_a_folder_nothing_is_kept(is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no home, and where the folder cannot be written."""
    from treepo_trl.apps.completion.command import command_parser

    def no_home(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    if is_there:
        (tmp_path / "treepo-trl").touch()  # a file where the folder would be
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = table_file("completion")
    save_table(file, command_parser(), command_parser())
    assert load_table(file) is None
