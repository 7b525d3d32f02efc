"""Command lines of the documentation: whether what they name is there, and the real parsers take their options."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trl

from tests.support.paths import ROOT
from treepo_trl.cli import COMMANDS


OTHER_PROGRAMS = {
    *("cd", "mkdir", "source", "export", "echo", "cat", "git", "ssh", "docker", "uv", "nvidia-smi"),
    *("pre-commit", "trl", "vllm", "ollama", "trackio", "wandb", "hf", "jupyter"),
}
"""What is not ours to check."""

ON_A_PROCESSOR = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false"]
"""Options with which the settings of a training for a GPU are read on a machine without one."""

_CONTROL = {"&&", "||", "|", ";", "&"}


class ParsedError(BaseException):
    """The parser has taken the options, but for these; what the command would do comes next."""

    def __init__(self, rest: list[str] | None = None) -> None:
        super().__init__()
        self.rest = rest or []


def commands_of(script: str) -> list[list[str]]:
    """
    The words of each command of a shell script, without comments, redirections and variables of the environment.

    >>> commands_of('A=1 echo "a b" | cat --more > out.txt  # and so on')
    [['echo', 'a b'], ['cat', '--more']]
    """
    commands: list[list[str]] = []
    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
        lexer.whitespace_split = True
        words = [*lexer]
        while any(word in _CONTROL for word in words):
            end = next(i for i, word in enumerate(words) if word in _CONTROL)
            commands.append(words[:end])
            words = words[end + 1 :]
        commands.append(words)
    return [words for command in commands if (words := _bare(command))]


def _bare(command: list[str]) -> list[str]:
    if ">" in command:
        command = command[: command.index(">")]
    is_setting = [re.fullmatch(r"[A-Z_0-9]+=.*", word) is not None for word in [*command, ""]]
    return command[is_setting.index(False) :]


def check_command(words: list[str]) -> None:
    """Fail unless what a command names is there, and its options are."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "treepo-trl":
        check_treepo_trl(rest)
    elif program in ("python", "bash", "accelerate"):
        check_script(program, rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), f"`{' '.join(words)}`: no such target"
    elif program == "pip":
        check_extras(" ".join(rest))
    else:
        assert program in OTHER_PROGRAMS, f"`{program}` is new in the documentation: check it, or list it here."


def check_treepo_trl(argv: list[str]) -> None:
    """Let the command's own parser read its options, up to the last check that needs no model and no data."""
    if argv[:1] in ([], ["--help"], ["--version"], ["--debug"]) or argv[-1] == "--help":
        return
    if argv[0] in ("train", "quickstart"):
        argv = [*argv, *ON_A_PROCESSOR]
    assert argv[0] in COMMANDS, f"`treepo-trl {argv[0]}`: no such command"
    with parsers_that_stop():
        importlib.import_module(COMMANDS[argv[0]][1]).main(argv[1:])


HAND_ON = {"benchmarks.quickstart"}
"""Scripts whose further options are those of `treepo-trl quickstart`."""


def check_script(program: str, rest: list[str]) -> None:
    """A file of this repository, or `-m` and a module of it: what is in Python runs up to the end of its parser."""
    if program == "accelerate":
        assert rest[0] == "launch"
        rest = rest[next(i for i, word in enumerate(rest) if word.endswith(".py")) :]
    is_module = rest[0] == "-m"
    name, *options = rest[is_module:]
    if is_module:
        assert importlib.util.find_spec(name) is not None, f"there is no module {name}"
    else:
        assert Path(name).is_file(), f"there is no file {name}"
    if program == "bash" or name == "venv":
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *options, *(ON_A_PROCESSOR if "--config" in options else [])])
        hands_on = name in HAND_ON
        if not is_module:
            patch.syspath_prepend(Path(name).parent.resolve())  # as Python does for a script
        with skipped_without_package(), parsers_that_stop("parse_known_args" if hands_on else "parse_args") as rest:
            (runpy.run_module if is_module else runpy.run_path)(name, run_name="__main__")
    if hands_on:
        check_treepo_trl(["quickstart", *rest])


@contextmanager
def skipped_without_package() -> Iterator[None]:
    """Skip the test of a script whose package is not installed here."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in ("treepo_trl", "benchmarks", "tests"):
            raise
        pytest.skip(f"the script needs {error.name}")


def check_extras(words: str) -> None:
    """Extras of this package that `pip install` names."""
    known = importlib.metadata.metadata("treepo-trl").get_all("Provides-Extra")
    for extras in re.findall(r"(?:treepo-trl|\.)\[([\w,-]+)\]", words):
        assert set(extras.split(",")) <= set(known or []), f"`pip {words}`: no such extra"


@contextmanager
def parsers_that_stop(method: str = "parse_args") -> Iterator[list[str]]:
    """
    Every parser of options stops its program once it has taken them; one that does not take them fails the test.

    Gives the list of options that are left over for another parser, by the end of the block.

    Args:
        method (`str`):
            Of `argparse.ArgumentParser`, which the program calls.
    """
    rest: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((argparse.ArgumentParser, method), (trl.TrlParser, "parse_args_and_config")):
            patch.setattr(owner, name, _stopping(getattr(owner, name)))
        patch.setattr("treepo_trl.apps.doctor.recipe.small_model", str)  # it would be written to the user's cache
        patch.setattr("treepo_trl.apps.doctor.command.examine", _stop)
        try:
            yield rest
        except ParsedError as end:
            rest += end.rest
            return
        except SystemExit as error:
            raise AssertionError(f"the options are refused: {error}") from error
    raise AssertionError("no parser has read the options")


def _stop(*_: object) -> NoReturn:
    raise ParsedError


def _stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        parsed = parse(self, *args, **kwargs)
        raise ParsedError(parsed[1] if parse.__name__ == "parse_known_args" else [])

    return wrapped
