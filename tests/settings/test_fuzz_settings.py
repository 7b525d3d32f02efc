"""
Random settings at the edges of all fields, in Python and on the command line: each holds, or is refused by its name.

`TREEPO_FUZZ_CASES=334000 pytest tests/settings/test_fuzz_settings.py` draws 334,000 settings and 10,000 command lines.
"""

import json
import math
import os
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from enum import EnumMeta
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
import yaml
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig

from tests.support.sample_runs import as_flags
from treepo_trl import TreePOConfig, TreeSamplingConfig
from treepo_trl.cli import main
from treepo_trl.command_line.arguments import PlanArguments, SampleArguments, TreePOScriptArguments
from treepo_trl.command_line.engine_arguments import EngineArguments
from treepo_trl.engines import SamplingOptions


CASES = int(os.environ.get("TREEPO_FUZZ_CASES", "10000"))
CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}

# By the type that takes them: the edges of its values, and of what may stand there by mistake.
EDGES: dict[object, list[Any]] = {
    bool: [True, False],
    int: [0, -1, 1, 2, 3, 7, 8, 16, 512, 10**9, 10**400, -(10**400)],
    float: [0.0, 1.0, 0.5, -0.5, 1.5, 1e308, 5e-324, math.nan, math.inf, -math.inf],
    str: [*("", "x", "true", "None", "0", "nan", "{", "{}", '{"top_p": 0.5}', "[1]", "(", "x*", "x{9999999999}", "é")],
    list: [[], [0], [2, 4], [2, 4, 8], [math.nan], [math.inf, 1.0], ["x"], [None], (2, 4)],
    dict: [{}, {"temperature": 0.5}, {"top_p": 2}, {"top_k": "x"}, {"x": math.nan}, {1: 2}],
    NoneType: [None],
}


def kinds_of(*settings: type) -> dict[str, object]:
    """The annotations of all fields, whatever a parser has made of the fields' types."""
    hints = [(field, get_type_hints(each)[field.name]) for each in settings for field in fields(each)]
    return {field.name: hint for field, hint in hints if field.init}


def values_of(hint: object) -> list[Any]:
    """Edges of a type. Of one with options also these, each once more with a letter too many."""
    values: list[Any] = []
    for kind in (hint, *get_args(hint)):
        options = list(get_args(kind)) if get_origin(kind) is Literal else []
        options = [member.value for member in kind] if isinstance(kind, EnumMeta) else options
        values += [*options, *(f"{option}e" for option in options), *EDGES.get(get_origin(kind) or kind, [])]
    return values


def draw(rng: random.Random, kinds: dict[str, object]) -> dict[str, Any]:
    """One to four fields with values at the edges of their types, and now and then of another."""
    changed = rng.sample(sorted(kinds), rng.randint(1, 4))
    fitting = {name: values_of(kinds[name]) for name in changed}
    return {
        name: rng.choice(values if values and rng.random() < 0.8 else rng.choice(list(EDGES.values())))
        for name, values in fitting.items()
    }


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Settings of transformers write to the environment, and take text for files of the working folder."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), mock.patch.dict(os.environ):
        warnings.simplefilter("ignore")
        yield


def error_of(settings: type, values: dict[str, Any]) -> Exception | None:
    try:
        settings(**{"output_dir": "out", **CPU, **values})
    except Exception as error:
        return error
    return None


def test_settings_hold_or_an_error_names_one_that_was_changed() -> None:
    """What stock `GRPOConfig` refuses may be in its words."""
    rng = random.Random(0)
    kinds, stock = kinds_of(TreePOConfig), kinds_of(GRPOConfig)
    accepted = 0
    for _ in range(CASES):
        changed = draw(rng, kinds)
        error = error_of(TreePOConfig, changed)
        accepted += error is None
        is_named = isinstance(error, ValueError | TypeError | ImportError) and any(
            name in str(error) for name in changed
        )
        if error is not None and not is_named:
            of_stock = error_of(GRPOConfig, {name: value for name, value in changed.items() if name in stock})
            assert type(of_stock) is type(error), f"{changed}: {error!r}"
    assert CASES // 5 < accepted < CASES


# The command line

COMMANDS: dict[str, tuple[type, ...]] = {
    "train": (TreePOScriptArguments, TreePOConfig, ModelConfig, DatasetMixtureConfig),
    "plan": (TreePOScriptArguments, TreePOConfig, ModelConfig, DatasetMixtureConfig, PlanArguments),
    "sample": (SampleArguments, EngineArguments, SamplingOptions, TreeSamplingConfig),
}
BEHIND_THE_PARSER = {"train": "train", "plan": "plan_training", "sample": "load_tokenizer"}


class Parsed(BaseException):
    """All is parsed and checked, and a model would be loaded next."""


def stop(*args: object) -> None:
    raise Parsed


def as_words(rng: random.Random, name: str, value: object) -> list[str]:
    """A field as someone may type it, rightly or not."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    words = [json.dumps(each) if isinstance(each, dict) else str(each) for each in values]
    flag = f"--{name}{rng.choice(['', '', '', '', '', '', '', 'e'])}"
    return [f"{flag}={words[0]}", *words[1:]] if words and rng.random() < 0.2 else [flag, *words]


def command_line(rng: random.Random, kinds: dict[str, object], folder: Path) -> list[str]:
    """Some settings as flags, or in a file of `--config`, which may be broken or not there."""
    changed = draw(rng, kinds)
    if rng.random() < 0.5:
        return [word for name, value in changed.items() for word in as_words(rng, name, value)]
    file = folder / "config.yaml"
    text = yaml.dump({name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()})
    file.write_text(text if rng.random() < 0.9 else text[: rng.randrange(len(text))])
    name = str(file) if rng.random() < 0.95 else rng.choice(["none.yaml", ".", ""])
    return rng.choice(
        [["--config", name], [f"--config={name}"], ["--config"]] if rng.random() < 0.2 else [["--config", name]]
    )


def changed_in(folder: Path) -> str:
    """What the config file held, for the message of a test that fails."""
    file = folder / "config.yaml"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_is_parsed_or_refused_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"treepo_trl.apps.{command}.command.{BEHIND_THE_PARSER[command]}", stop)
    rng = random.Random(0)
    kinds = kinds_of(*COMMANDS[command])
    base = (
        []
        if command == "sample"
        else as_flags({**CPU, "output_dir": "out", "card_gib": 1 if command == "plan" else None})
    )
    accepted, wrong = 0, []
    for _ in range(CASES // 100):
        argv = [*base, *command_line(rng, kinds, tmp_path)]
        try:
            main([command, *argv])
        except Parsed:
            accepted += 1
        except SystemExit as end:
            message = capsys.readouterr().err if end.code == 2 else str(end.code)
            if not re.fullmatch(rf"treepo-trl( {command})?: error: .+\n?", message):
                wrong.append((message, argv, changed_in(tmp_path)))
        except Exception as error:
            wrong.append((repr(error), argv, changed_in(tmp_path)))
    assert wrong == []
    assert 0 < accepted < CASES // 100
