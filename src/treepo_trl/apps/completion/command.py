"""`treepo-trl completion`: a script with which bash or zsh completes commands, options, choices and files."""

import argparse
import importlib

from treepo_trl.apps import COMMANDS
from treepo_trl.command_line.errors import user_errors
from treepo_trl.command_line.examples import EXAMPLES


def command_parser() -> argparse.ArgumentParser:
    """The argument of `treepo-trl completion`."""
    parser = argparse.ArgumentParser(
        "treepo-trl completion",
        description=EXAMPLES["completion"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="Shell that reads the script.")
    return parser


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl completion`."""
    shell = command_parser().parse_args(argv).shell
    with user_errors():
        print(completion_script(shell))


def completion_script(shell: str) -> str:
    """
    The script for a shell. It holds all options, so TAB starts no program.

    Args:
        shell (`str`):
            `bash` or `zsh`.
    """
    import shtab

    return shtab.complete(_all_commands(), shell)


def _all_commands() -> argparse.ArgumentParser:
    """One parser over the commands, for a shell: nothing is parsed with it."""
    parser = argparse.ArgumentParser("treepo-trl")
    parser.add_argument("--debug", action="store_true", help="Show where in the code an error was found.")
    parser.add_argument("--version", action="store_true", help="Print the version.")
    subparsers = parser.add_subparsers()
    for name, (line, module) in COMMANDS.items():
        options = importlib.import_module(module).command_parser()
        for action in options._actions:
            _prepare(action)
        subparsers.add_parser(name, parents=[options], add_help=False, help=line, conflict_handler="resolve")
    return parser


def _prepare(action: argparse.Action) -> None:
    """Let an option have one name, a short help, and something to complete behind it."""
    import shtab

    # TRL's parser takes `--bare-words` for `--bare_words` too.
    names = [name for name in action.option_strings if "-" not in name[2:]]
    action.help = (action.help or "").partition(". ")[0] if names or not action.option_strings else argparse.SUPPRESS
    action.option_strings = names or action.option_strings
    takes_value = action.nargs != 0
    if action.nargs == "?" and action.const is True:  # a switch of TRL's parser
        action.choices = ("true", "false")
    elif takes_value and action.choices is None:
        action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
