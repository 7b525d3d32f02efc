"""What is told of a command line before its command is imported."""

import argparse
import os
from collections.abc import Callable
from typing import cast

from .config_file import check_options, split_words
from .data_files import check_data_file, require_run
from .import_paths import check_import_path
from .models import check_hub, require_model
from .option_table import load_table, save_table, table_file


_HUB_NAMES = ("model_name_or_path", "adapter_name_or_path", "dataset_name")
_READ_DATA = ("train", "sample", "eval")
_NEVER_OF_THE_HUB = ("-", "addition")  # standard input, and tasks that are made here
Parsers = Callable[[], tuple[argparse.ArgumentParser, argparse.ArgumentParser]]


def answer(command: str, argv: list[str], parsers: Parsers) -> None:
    """
    Print a command's help and exit, or say what is wrong with its options and files; returns if nothing is.

    Args:
        command (`str`):
            Its name.
        argv (`list[str]`):
            What stands after the name.
        parsers (`Callable`):
            Makes the parser of its help and that of its options, once for each version: the next call finds them in
            the cache.

    Raises:
        ValueError: for an option that the command does not have, a file that is missing, a model that is neither here
            nor can be loaded.
    """
    file = table_file(command)
    kept = load_table(file)
    help_parser, parser = parsers() if kept is None else kept
    if kept is None:
        save_table(file, help_parser, parser)
    words = split_words(argv)
    if any(word in ("-h", "--help") for word in words):
        help_parser.print_help()
        raise SystemExit(0)
    parser.prog = f"treepo-trl {command}"
    given = check_options(parser, words)
    variables = given.get("env")
    if isinstance(variables, dict):  # TRL sets them again; the hub's client reads them at its import
        os.environ.update({str(name): str(value) for name, value in variables.items()})
    if command != "quickstart":  # its file of settings is its own
        _check_names(command, given)


def _check_names(command: str, given: dict[str, object]) -> None:
    """Files, import paths and models that options name."""
    data, model = None if given.get("datasets") else given.get("dataset_name"), given.get("model_name_or_path")
    if isinstance(data, str) and command in _READ_DATA:
        check_data_file(data)
    runs = given.get("runs", given.get("run"))  # of `view` and `export`
    for run in runs if isinstance(runs, list) else [runs]:
        if isinstance(run, str) and run:
            require_run(run)
    for option, separator in (("reward_funcs", "."), ("tools", ":"), ("environment", ":")):
        value = given.get(option)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and separator in path:  # else a name of TRL, or told by what loads it
                check_import_path(f"--{option}", path, separator)
    if isinstance(model, str) and model:
        require_model(model)
    names = {name: value for name in _HUB_NAMES if isinstance(value := given.get(name), str) and value}
    is_of_hub = data not in (None, *_NEVER_OF_THE_HUB) and ":" not in str(data)  # such as reasoning_gym:NAME
    if command not in _READ_DATA or not is_of_hub:
        names.pop("dataset_name", None)
    if "WORLD_SIZE" in os.environ or given.get("push_to_hub"):
        return  # processes must agree, and an upload needs the hub at the end
    is_elsewhere = bool(given.get("model_init_kwargs"))  # which may name a revision and a cache
    check_hub(names, cast("str | None", given.get("model_revision")), command != "doctor" and not is_elsewhere)
