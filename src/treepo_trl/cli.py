"""The command line `treepo-trl`: which command runs. `COMMANDS` says in which file each is."""

import argparse
import importlib
import sys
from contextlib import nullcontext
from types import ModuleType

from . import __version__
from .apps import COMMANDS
from .command_line.errors import tracebacks, user_errors
from .preflight import answer, quiet_terminal


def usage() -> str:
    """What `treepo-trl --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: treepo-trl [--debug] {{{','.join(COMMANDS)}}} [--config FILE] [options]",
            "",
            "commands:",
            *(f"  {name:{width}}   {line}" for name, (line, _) in COMMANDS.items()),
            "",
            "`treepo-trl COMMAND --help` lists a command's options, below examples.",
            "`treepo-trl --debug COMMAND` shows where in the code an error was found.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """
    Entry point of `treepo-trl`. Loads the module of the command that runs, and no other.

    What can be answered without its module is answered before.
    """
    argv = sys.argv[1:] if argv is None else argv
    is_debugging = argv[:1] == ["--debug"]
    argv = argv[is_debugging:]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(f"treepo-trl {__version__}")
        return
    parser = argparse.ArgumentParser(prog="treepo-trl", usage=usage().partition("\n")[0].removeprefix("usage: "))
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(argv[:1]).command
    quiet_terminal()
    with tracebacks() if is_debugging else nullcontext():
        with user_errors():
            answer(command, argv[1:], lambda: _parsers(command))
        _module(command).main(argv[1:])


def _module(command: str) -> ModuleType:
    return importlib.import_module(COMMANDS[command][1])


def _parsers(command: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser that prints a command's help, and that of its options. In most commands they are one."""
    module = _module(command)
    parser = module.command_parser()
    return (module.help_parser() if hasattr(module, "help_parser") else parser), parser


if __name__ == "__main__":
    main()
