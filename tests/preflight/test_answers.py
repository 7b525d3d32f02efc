"""What a command line is told before its command is imported."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from treepo_trl.apps import COMMANDS
from treepo_trl.cli import main
from treepo_trl.preflight import answer


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks a real hub, and none changes what later tests ask."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Session(None))


class Session:
    """The hub's client, with an answer or an error."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def head(self, url: str, timeout: float) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


def asked(command: str, *argv: str) -> None:
    """What `treepo-trl` asks before it imports the command."""

    def parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
        module = importlib.import_module(COMMANDS[command][1])
        parser = module.command_parser()
        return getattr(module, "help_parser", lambda: parser)(), parser

    answer(command, list(argv), parsers)


def test_a_known_command_line_is_answered_without_libraries(tmp_path: Path) -> None:
    """Twice in a new process each, as the first one makes the table."""
    code = (
        "import sys\nfrom treepo_trl.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as exit:\n    print(exit.code, file=sys.stderr)\n"
        "print('loaded', sorted({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for arguments, said in (
        (["train", "--help"], "usage: treepo-trl train"),
        (["train", "--learnin_rate", "1"], "has no option --learnin_rate (did you mean --learning_rate?)"),
        (["train", "--dataset_name", "no.jsonl"], "`--dataset_name no.jsonl` looks like a file, but there is none"),
        (["view", ".", "no_run"], "`no_run` does not exist. Name a run's `output_dir`"),
        (["export", "no_run"], "`no_run` does not exist"),
        (["train", "--config", "no.yaml"], "`--config no.yaml` cannot be read: No such file or directory."),
    ):
        command = [sys.executable, "-c", code, *arguments]
        for _ in range(2):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
            assert said in done.stdout + done.stderr
        assert done.stderr.splitlines()[-1] == "loaded []"


def test_a_mistyped_option_is_named_with_the_one_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`treepo-trl train` has no option --num_generation \(did you mean --num_gen"
    ):
        asked("train", "--num_generation", "4")
    with pytest.raises(ValueError, match=r"`treepo-trl plan` does not know what 8 is for"):
        asked("plan", "--card_gib", "24", "8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env:\n  A: b\nsegment_lenght: 32\nmax_steps: 3\n")
    for command in ("train", "plan", "doctor"):
        with pytest.raises(
            ValueError, match=r"no options of `treepo-trl .*`: segment_lenght \(did you mean segment_le"
        ):
            asked(command, f"--config={recipe}")


def test_a_right_command_line_is_told_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env:\n  A: b\nsegment_length: 32\nreward_funcs: accuracy_reward\n")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "1 + 1 ="}\n')
    asked("train", "--config", str(recipe), "--dataset_name", str(tasks), "--model_name_or_path", str(tmp_path))
    asked("view", str(tmp_path), str(tasks), "--health")
    asked("sample", "--model_name_or_path", "some/model", "--num_generations", "4")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--reward_funcs", "no_such_file.reward"),
        ("--tools", "no_such_file:tool"),
        ("--environment", "no_such_file.sub:Class"),
    ],
)
def test_code_that_is_not_there(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"`{option} {value}` could not be loaded: No module named 'no_such_file'"):
        asked("train", option, value)


def test_code_is_looked_for_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "loud_reward.py").write_text("raise RuntimeError('it ran')")
    before = list(sys.path)
    asked("train", "--reward_funcs", "loud_reward.reward", "accuracy_reward")
    assert sys.path == before, "a file here may have the name of a library that is imported next"


def test_what_is_not_used_is_not_looked_at(tmp_path: Path) -> None:
    """A mixture goes before a data set, and the command line before a file, with values that are the defaults too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: gone.jsonl\ndatasets:\n  - path: json\n")
    asked("train", "--config", str(recipe))
    recipe.write_text("dataset_name: gone.jsonl\n")
    asked("sample", "--config", str(recipe), "--dataset_name", "-")
    with pytest.raises(ValueError, match=r"`--dataset_name gone\.jsonl` looks like a file"):
        asked("sample", "--config", str(recipe))


@pytest.mark.parametrize("name", ["help", "config"])
def test_a_file_sets_no_help_and_no_file(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: true\n")
    with pytest.raises(ValueError, match=f"no options of `treepo-trl plan`: {name}"):
        asked("plan", "--config", str(recipe))


UNREACHABLE = httpx.ConnectError("Name or service not known")


@pytest.mark.parametrize("command", ["train", "plan", "sample", "eval"])
def test_a_model_that_cannot_be_reached_is_told_at_once(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(UNREACHABLE)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    with pytest.raises(
        ValueError, match=r"`--model_name_or_path no/model` is no folder here .*Name or service not kn"
    ):
        asked(command, "--model_name_or_path", "no/model")
    assert session.asked == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"`HF_HUB_OFFLINE` is set"):
        asked(command, "--model_name_or_path", "no/model")
    assert session.asked == 2


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Session(httpx.UnsupportedProtocol("No protocol.")))
    with pytest.raises(ValueError, match=r": No protocol \(look at `HF_ENDPOINT` and the proxies\)\. Give a folder"):
        asked("plan", "--model_name_or_path", "no/model")


def test_a_training_that_needs_the_hub_later_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that uploads, and one of several processes, which must agree: what loads the model says what is missing."""
    session = Session(UNREACHABLE)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    asked("train", "--model_name_or_path", "no/model", "--push_to_hub", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked("train", "--model_name_or_path", "no/model")
    assert session.asked == 0
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_variables_of_a_file_are_set_before_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env:\n  A_PROXY: http://proxy:1\nmodel_name_or_path: no/model\n")
    seen: list[str | None] = []
    monkeypatch.setenv("A_PROXY", "before")
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: seen.append(os.environ["A_PROXY"]) or Session(None))
    asked("plan", "--config", str(recipe))
    assert seen == ["http://proxy:1"]


def test_a_model_of_the_cache_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(UNREACHABLE)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--a--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({}))
    for _ in range(2):
        asked("plan", "--model_name_or_path", "a/model")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert capsys.readouterr().err.count("models and data come from its cache") == 1
    assert session.asked == 2
    with pytest.raises(ValueError, match="not in the hub's cache"):
        asked("plan", "--model_name_or_path", "a/model", "--model_revision", "v1")
    (snapshot.parents[1] / "refs" / "v1").write_text("abc")
    asked("plan", "--model_name_or_path", "a/model", "--model_revision", "v1")


def test_a_folder_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(UNREACHABLE)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    asked("plan", "--model_name_or_path", str(tmp_path), "--dataset_name", "of/the-hub")  # which `plan` does not read
    asked("eval", "--model_name_or_path", str(tmp_path), "--dataset_name", "reasoning_gym:chain_sum")
    asked("doctor", "--model_name_or_path", str(tmp_path))
    assert session.asked == 0


def test_an_answer_is_one_line_on_the_command_line() -> None:
    with pytest.raises(SystemExit, match=r"^treepo-trl: error: `treepo-trl plan` has no option --crad_gib \(did you"):
        main(["plan", "--crad_gib", "24"])
