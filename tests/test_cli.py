"""Which command runs, and what is said where none does."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from treepo_trl import __version__
from treepo_trl.cli import COMMANDS, main


USAGE = f"usage: treepo-trl [--debug] {{{','.join(COMMANDS)}}}"


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{USAGE} [--config FILE] [options]"
    described = [entry.split(None, 1) for entry in lines[3 : 3 + len(COMMANDS)]]
    assert described == [[name, line] for name, (line, _) in COMMANDS.items()]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"treepo-trl {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_gets_the_arguments_after_its_name(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "options.yaml").write_text("env: {}")
    arguments = ["bash"] if command == "completion" else ["--config", str(tmp_path / "options.yaml")]
    calls: list[list[str]] = []
    monkeypatch.setattr(importlib.import_module(COMMANDS[command][1]), "main", calls.append)
    main([command, *arguments])
    assert calls == [arguments]


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["trian"])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert USAGE in message
    assert "trian" in message


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "completion"])
def test_config_without_a_file(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([command, "--config"])
    assert error.value.code == 2
    assert capsys.readouterr().err == f"treepo-trl {command}: error: argument --config: expected one argument\n"


def test_help_loads_no_library() -> None:
    code = "import sys; from treepo_trl.cli import main; main(['--help']); print({'torch', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["--segment_length", "--tree_packing", "--use_peft", "--dataset_name", "--reward_funcs"]),
        ("sample", ["--dataset_name", "--engine {auto,vllm,transformers}", "--num_generations", "--compare"]),
        ("view", ["--out", "--serve", "--tokenizer", "treepo-trl view outputs/quickstart"]),
        ("export", ["--out", "--dtype", "--load_in_4bit", "treepo-trl export outputs/quickstart"]),
    ],
)
def test_help_of_a_command_lists_all_parts(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert [option for option in options if option not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    before, _, after = capsys.readouterr().out.partition("examples:\n")
    assert len(before.splitlines()) <= 3  # the usage
    examples = after.split("\n\n")[0].splitlines()
    assert len(examples) >= 3
    assert all(f"treepo-trl {command}" in line for line in examples)


def test_an_error_of_the_user_is_a_line_or_a_traceback() -> None:
    arguments = ["view", "no-such-run"]
    with pytest.raises(SystemExit, match="treepo-trl: error: "):
        main(arguments)
    with pytest.raises((ValueError, OSError), match="no-such-run"):
        main(["--debug", *arguments])
    with pytest.raises(SystemExit, match="treepo-trl: error: "):
        main(arguments)  # the choice ends with its call


def test_installed_command(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "treepo-trl"
    if not command.exists():
        pytest.skip("treepo-trl is not installed in this environment")
    result = subprocess.run([command], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert result.returncode == 0
    assert USAGE in result.stdout
