"""`treepo-trl train` with tools and environments of the user's own."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.support.paths import ROOT
from tests.support.sample_runs import as_flags
from tests.support.tools import make_letter_model, make_letter_tokenizer, questions
from tests.support.train_runs import FLAGS as TRAIN_FLAGS
from treepo_trl.apps.train.command import main
from treepo_trl.tree_log import read_trees


MODULE = '''
def echo(text: str) -> str:
    """
    Says it twice.

    Args:
        text: What to say.
    """
    return text + text


class Echoes:
    number = 0

    def reset(self, **kwargs):
        Echoes.number += 1
        self.said = []
        return f"Say {Echoes.number}."

    def echo(self, text: str) -> str:
        """
        Says it twice.

        Args:
            text: What to say.
        """
        self.said.append(text)
        return text + text

    def get_reward(self) -> float:
        return float(len(self.said))

    def _fork(self):
        other = Echoes()
        other.said = list(self.said)
        return other


def length(completions, **kwargs):
    return [float(len(each)) for each in completions]


calls = 3
'''
FLAGS = {**TRAIN_FLAGS, "max_steps": 1, "max_completion_length": 360, "segment_length": 20, "log_trees": True}


@pytest.fixture
def folder(training_folder: Path) -> Path:
    """A user's working folder: a model that can call, a dataset, and a module."""
    make_letter_model().save_pretrained("model")
    make_letter_tokenizer().save_pretrained("model")
    Path("my_game.py").write_text(MODULE)
    Dataset.from_list(list(questions())).to_json("data.jsonl")
    return training_folder


@pytest.mark.parametrize(
    "options",
    [
        {"tools": ["my_game:echo"], "reward_funcs": ["my_game.length"], "dataset_name": "data.jsonl"},
        {"environment": "my_game:Echoes"},
    ],
    ids=["tools", "environment"],
)
def test_a_training_from_the_command_line(folder: Path, options: dict[str, Any]) -> None:
    main(as_flags({"model_name_or_path": "model", **FLAGS, **options}))
    (line, *_) = read_trees(folder / "out/trees/trees_000000.jsonl")
    assert any(not node.get("is_sampled", True) for node in line["tree"]["nodes"])
    assert (folder / "out/model.safetensors").exists()


@pytest.mark.parametrize("script", ["calculator.py", "guessing_game.py", "openenv_game.py"])
def test_the_examples_run(script: str, chat_model_dir: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of a random model, on prompts that fit its context."""
    if script == "openenv_game.py":
        pytest.importorskip("openenv", reason="`pip install openenv-core`")
        monkeypatch.syspath_prepend(str(ROOT / "examples/scripts"))
    settings = {"model_name_or_path": chat_model_dir, "max_steps": 1, "output_dir": "out", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 64, "bf16": False}
    monkeypatch.setattr(sys, "argv", [script, *as_flags(settings)])
    runpy.run_path(str(ROOT / "examples/scripts" / script), run_name="__main__")
    assert (folder / "out/trees/trees_000000.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": ["my_game.echo"]}, "`--tools my_game.echo` is no import path. Give .*`my_package.file:name`"),
        ({"tools": ["my_game:nothing"]}, "`--tools my_game:nothing` could not be loaded: .*no attribute 'nothing'"),
        ({"environment": "no_game:Game"}, "`--environment no_game:Game` could not be loaded: No module named"),
        ({"environment": "my_game:calls"}, "`--environment my_game:calls` is a int; give a function or class"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_no_tool_or_environment(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(as_flags({"model_name_or_path": "model", **FLAGS, **options}))
