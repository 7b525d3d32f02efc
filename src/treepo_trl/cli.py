"""The command line `treepo-trl`: which command runs. Each command is a file in `commands`."""

import argparse
import importlib
import sys
from contextlib import nullcontext

from . import __version__
from .commands import COMMANDS
from .commands.errors import tracebacks


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
    """Entry point of `treepo-trl`. Loads the module of the command that runs, and no other."""
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
    _, module = COMMANDS[command]
    run = importlib.import_module(f"treepo_trl.commands.{module}").main
    with tracebacks() if is_debugging else nullcontext():
        run(argv[1:])


if __name__ == "__main__":
    main()
