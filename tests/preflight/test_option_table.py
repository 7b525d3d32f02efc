"""A command's options as data: the same help, the same errors, made anew where they no longer hold."""

import importlib
import json
from pathlib import Path

import pytest

from treepo_trl.cli import COMMANDS
from treepo_trl.preflight import option_table
from treepo_trl.preflight.option_table import as_data, as_parser, load_table, save_table, table_file


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_that_of_the_parser(command: str) -> None:
    module = importlib.import_module(f"treepo_trl.commands.{COMMANDS[command][1]}")
    for name in ("command_parser", "help_parser"):
        if hasattr(module, name):
            parser = getattr(module, name)()
            kept = as_parser(json.loads(json.dumps(as_data(parser))))
            assert kept.format_help() == parser.format_help()


def test_numbers_and_choices_are_checked_as_the_parser_checks_them(capsys: pytest.CaptureFixture[str]) -> None:
    from treepo_trl.commands.train import command_parser

    parser = command_parser()
    kept = as_parser(as_data(parser))
    for arguments in (["--max_steps", "ten"], ["--branch_schedule", "wide"], ["--learning_rate"]):
        said = []
        for each in (parser, kept):
            with pytest.raises(SystemExit):
                each.parse_args(arguments)
            said.append(capsys.readouterr().err.splitlines()[-1])
        assert said[0] == said[1]


def test_a_table_is_kept_and_a_broken_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from treepo_trl.commands.view import command_parser

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = table_file("view")
    assert load_table(file) is None
    file.parent.mkdir(parents=True)
    old = file.with_name("view-0123456789abcdef.json")
    old.touch()
    parser = command_parser()
    save_table(file, parser, parser)
    table = load_table(file)
    assert table is not None
    assert as_parser(table["help"]).format_help() == parser.format_help()
    assert list(file.parent.iterdir()) == [file]  # of one version alone
    for broken in ("", "{", "[]", '{"help": {}}'):
        file.write_text(broken)
        assert load_table(file) is None


def test_other_versions_have_other_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    here = table_file("train")
    assert table_file("train") == here != table_file("plan")
    monkeypatch.setattr(option_table, "version", lambda name: "9.9" if name == "transformers" else "1.0")
    assert table_file("train") != here


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from treepo_trl.commands.completion import command_parser

    (tmp_path / "treepo-trl").touch()  # a file where the folder would be
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = table_file("completion")
    save_table(file, command_parser(), command_parser())
    assert load_table(file) is None
