"""Options of the command line and of the file of `--config`: whether a command has them."""

import argparse
import difflib
from collections.abc import Iterable

import yaml


def split_words(argv: Iterable[str]) -> list[str]:
    """The words of a command line, `--config=FILE` as two of them."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def config_of(parser: argparse.ArgumentParser, words: list[str]) -> str | None:
    """
    The file after `--config`; `None` without one.

    Exits with the parser's error if there is no name after it, or if there are two.
    """
    if "--config" not in words:
        return None
    following = words[words.index("--config") + 1 :]
    if not following or following[0].startswith("--"):  # TRL takes the next argument without looking
        parser.exit(2, f"{parser.prog}: error: argument --config: expected one argument\n")
    if "--config" in following:
        parser.exit(2, f"{parser.prog}: error: argument --config: give one file\n")
    return following[0]


def check_config(file: str) -> dict[str, object]:
    """The settings of a YAML file. Raises a `ValueError` unless the file is there and is a mapping of names."""
    try:
        with open(file) as stream:  # as TRL opens it
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ValueError(f"`--config {file}` cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`--config {file}` is no YAML file: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"`--config {file}` holds no settings. Write a setting per line, as `name: value`.")
    return content


def check_options(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, object]:
    """
    What was set, on the command line and in the file of `--config`; values as they were written.

    Raises:
        ValueError: for an option that the command does not have, with the one that is spelt most like it.
    """
    file = config_of(parser, words)
    settings = {} if file is None else check_config(file)
    # TRL sets the variables of `env`, and knows no file in a file.
    known = {action.dest for action in parser._actions} - {"help", "config"} | {"env"}
    wrong = [_with_guess(name, known) for name in settings if name not in known]
    if wrong:
        raise ValueError(
            f"`--config {file}` has settings that are no options of `{parser.prog}`: {', '.join(wrong)}. Rename or "
            "remove them."
        )
    given, rest = _given(parser, words)
    if rest:
        names = {name for action in parser._actions for name in action.option_strings}
        wrong = [_with_guess(word.partition("=")[0], names) for word in rest if word.startswith("-")] or rest
        raise ValueError(
            f"`{parser.prog}` has no option {', '.join(wrong)}. `{parser.prog} --help` lists them."
            if any(word.startswith("-") for word in rest)
            else f"`{parser.prog}` does not know what {' '.join(rest)} is for. Options begin with `--`."
        )
    return settings | given


def _given(parser: argparse.ArgumentParser, words: list[str]) -> tuple[dict[str, object], list[str]]:
    """What stands on the command line, values that are the defaults too; and words that are no options."""
    defaults = [action.default for action in parser._actions]
    try:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        given, rest = parser.parse_known_args(words)
    finally:
        for action, default in zip(parser._actions, defaults, strict=True):
            action.default = default
    return vars(given), rest


def _with_guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"{name} (did you mean {close[0]}?)" if close else name
