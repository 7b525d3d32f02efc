"""
The options of a command as data, kept in a file between runs.

The parser itself is made from the dataclasses of TRL and transformers, which take ten seconds to import.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Options with their defaults, below examples as they are written."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage is several hundred, and `--help` has it."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message alone."""
        self.exit(2, f"{self.prog}: error: {message}\n")


_FORMATTERS = {
    each.__name__: each for each in (DefaultsFormatter, argparse.RawDescriptionHelpFormatter, argparse.HelpFormatter)
}
_KINDS = {"_HelpAction": "help", "_StoreTrueAction": "store_true", "_StoreFalseAction": "store_false"}
_KEPT_SECONDS = 30 * 24 * 3600
_STANDS_ON = ("treepo-trl", "trl", "transformers", "accelerate")  # whose dataclasses and parser have the options


def cache_folder() -> Path:
    """Where the package keeps files that it can make again; one that cannot be made where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treepo-trl"
    except RuntimeError:
        return Path(os.devnull) / "treepo-trl"


def as_data(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A parser as JSON can hold it. Types are left out: the parser itself checks what it converts."""
    return {
        "prog": parser.prog,
        "usage": parser.usage,
        "description": parser.description,
        "formatter": getattr(parser.formatter_class, "__name__", ""),
        "arguments": [_action_as_data(action) for action in parser._actions],
    }


def _action_as_data(action: argparse.Action) -> dict[str, Any]:
    kind = _KINDS.get(type(action).__name__, "store")
    data: dict[str, Any] = {"names": action.option_strings, "kind": kind, "dest": action.dest, "help": action.help}
    if kind == "help":
        return data
    default = action.default
    data["default"] = default if default is None or isinstance(default, bool | int | float) else str(default)
    if kind == "store":
        data |= {"nargs": action.nargs, "metavar": action.metavar}
        data["choices"] = None if action.choices is None else [str(choice) for choice in action.choices]
    return data


def as_parser(data: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser of `as_data`: the same help, the same options."""
    parser = OneLineParser(
        data["prog"],
        data["usage"],
        data["description"],
        formatter_class=_FORMATTERS[data["formatter"]],
        allow_abbrev=False,
        add_help=False,
    )
    for each in data["arguments"]:
        keys = ("help", "default", "nargs", "metavar", "choices")
        options = {key: each[key] for key in keys if key in each and each[key] is not None}
        options["action"] = each["kind"]
        if options.get("default") == argparse.SUPPRESS:
            options["default"] = argparse.SUPPRESS  # which argparse knows by its identity
        if each["names"]:
            options["dest"] = each["dest"]
        parser.add_argument(*(each["names"] or [each["dest"]]), **options)
    return parser


def table_file(command: str) -> Path:
    """Where a command's options are kept: another file for other versions, and after a change of this package."""
    package = Path(__file__).parents[1]
    sources = sorted((str(path), path.stat().st_mtime_ns) for path in package.rglob("*.py"))
    versions = [sys.version, *map(_version, _STANDS_ON)]
    key = hashlib.sha256(repr((versions, sources)).encode()).hexdigest()[:16]
    return cache_folder() / "options" / f"{command}-{key}.json"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


def load_table(file: Path) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser] | None:
    """The two parsers that `save_table` has written; `None` if there is nothing, or nothing that can be read."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return as_parser(table["help"]), as_parser(table["options"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def save_table(file: Path, help_parser: argparse.ArgumentParser, parser: argparse.ArgumentParser) -> None:
    """
    Keep a command's options, in place of old ones. A folder that cannot be written is left alone.

    Args:
        file (`Path`):
            As `table_file` names it.
        help_parser (`argparse.ArgumentParser`):
            What `--help` prints.
        parser (`argparse.ArgumentParser`):
            All that the command takes.
    """
    command = file.name.rpartition("-")[0]
    table = {"help": as_data(help_parser), "options": as_data(parser)}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            written = Path(scratch, file.name)
            written.write_text(json.dumps(table), encoding="utf-8")
            os.replace(written, file)
        for old in file.parent.glob(f"{command}-*.json"):
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:  # another environment may use a newer one
                old.unlink(missing_ok=True)
