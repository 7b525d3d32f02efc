"""What is refused of tools and environments, before anything is sampled."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.support.environments import Counter, Forking, fresh, game_trainer
from tests.support.models import make_tokenizer
from tests.support.tools import add, tool_config, tool_trainer
from tests.support.trainers import plain_prompts
from treepo_trl import TreePOTrainer


def undescribed(a: int) -> int:
    return a


def untyped(a) -> int:
    """
    Has no type hint.

    Args:
        a: A number.
    """
    return a


class Closing(Counter):
    def close(self) -> None:
        """Closes it."""


class NoReset:
    def step(self) -> str:
        """Steps."""
        return ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": plain_prompts(8)}, r"is text, but tools and environments need a conversation\. Give a"),
        ({"tools": [undescribed]}, "The tool 'undescribed' cannot be described to the model: .*docstring"),
        ({"tools": [untyped]}, "The tool 'untyped' cannot be described to the model: .*type hint"),
        (
            {"environment_factory": fresh(Closing), "tools": None},
            "Closing has the public method `close`, which becomes a tool.* Call it `_close`",
        ),
        ({"environment_factory": NoReset, "tools": None}, "must define a callable `reset`"),  # TRL's error
        ({"processing_class": make_tokenizer()}, "does not support tool calling"),  # TRL's error
        ({"tools": None, "train_dataset": None}, "`train_dataset` is required"),  # TRL's error
    ],
)
def test_refused_at_construction(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool_trainer(TreePOTrainer, tool_config(tmp_path), **arguments)


def test_no_tools_are_no_tools(tmp_path: Path) -> None:
    """An empty list asks for nothing, as in TRL."""
    trainer = tool_trainer(
        TreePOTrainer, tool_config(tmp_path), tools=[], train_dataset=plain_prompts(8), reward_funcs=lambda **_: [0.0]
    )
    assert not trainer._turns.is_used


def test_an_unknown_environment_is_named(tmp_path: Path) -> None:
    data = Dataset.from_dict({"environment": ["one", "two"] * 4, "start": range(8)})
    for rounds in (0, 1):
        trainer = game_trainer(
            TreePOTrainer,
            tmp_path / str(rounds),
            {"one": fresh(Forking)},
            train_dataset=data,
            dynamic_sampling_rounds=rounds,
        )
        with pytest.raises(ValueError, match="`environment='two'`, which is not among"):
            trainer.train()


def test_a_method_with_arguments_may_be_called_close(tmp_path: Path) -> None:
    class Door(Counter):
        def close(self, door: str) -> str:
            """
            Closes a door.

            Args:
                door: Which one.
            """
            return door

    trainer = game_trainer(TreePOTrainer, tmp_path, fresh(Door), tools=[add])
    assert "close" in {tool.__name__ for tool in trainer.tools}
