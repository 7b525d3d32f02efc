"""What tools return, and what the model is shown of it."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import ScriptedAgent, call, echo, tool_config, tool_trainer
from tests.support.trainers import RecordingTrainer, SpyTrainer, logs_of
from treepo_trl import SegmentTree, TreePOTrainer
from treepo_trl.tree_log import read_trees


def answers_of(trainer: Any) -> set[str]:
    """What the tools have said in all trees."""
    nodes = [node for trees in trainer.all_trees for tree in trees for node in tree.nodes]
    return {message["content"] for node in nodes for message in node.messages if message["role"] == "tool"}


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("word " * 50, "word word word word  [cut off]"),
        ("\N{GRINNING FACE}" * 20, "\N{GRINNING FACE}" * 5 + " [cut off]"),  # of 4 tokens each
        ("x" * 10**6, "x" * 20 + " [cut off]"),
        ("word " * 4, "word " * 4),
    ],
    ids=["words", "four tokens per character", "a million characters", "as long as allowed"],
)
def test_long_answers_are_cut_off(tmp_path: Path, answer: str, shown: str) -> None:
    def tell() -> str:
        """Tells."""
        return answer

    trainer = tool_trainer(
        RecordingTrainer,
        tool_config(tmp_path, max_steps=1, max_tool_answer_tokens=20),
        ScriptedAgent(0, [call("tell")], ["Done."]),
        tools=[tell],
    )
    trainer.train()
    assert answers_of(trainer) == {shown}


def test_an_answer_that_cannot_fit_is_not_tokenized(tmp_path: Path) -> None:
    """A million characters take seconds, in which the engine waits."""

    def tell() -> str:
        """Tells."""
        return "x" * 10**6

    class Untokenized(RecordingTrainer):
        def _get_tool_suffix_ids(self, tool_messages: Any) -> list[int]:
            raise AssertionError

    agent = ScriptedAgent(0, [call("tell")], ["Done."])
    trainer = tool_trainer(Untokenized, tool_config(tmp_path, max_steps=1), agent, tools=[tell])
    trainer.train()
    assert logs_of(trainer, "tree/finish_overlong_frac") == [1.0]


def test_a_tool_that_returns_an_image(tmp_path: Path) -> None:
    def look() -> list[dict[str, str]]:
        """Looks."""
        return [{"type": "image", "image": "x"}]

    trainer = tool_trainer(
        TreePOTrainer, tool_config(tmp_path), ScriptedAgent(0, [call("look")], ["Done."]), tools=[look]
    )
    with pytest.raises(ValueError, match=r"'look' has returned an image, which trees cannot train on.*Return text"):
        trainer.train()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([{"type": "text", "text": "a cat"}, {"type": "text", "text": " and a dog"}], "a cat and a dog"),
        (["a cat", 3], "['a cat', 3]"),
        ([], "[]"),
        ([{"type": "cat", "born": date(2020, 1, 1)}], "[{'type': 'cat', 'born': datetime.date(2020, 1, 1)}]"),
    ],
    ids=["text blocks", "list", "empty", "no blocks"],
)
def test_a_list_is_an_answer_that_the_model_sees(tmp_path: Path, value: list[Any], shown: str) -> None:
    """Templates of text models show nothing of a list; TRL hands them one."""

    def look() -> list[Any]:
        """Looks."""
        return value

    trainer = tool_trainer(
        SpyTrainer,
        tool_config(tmp_path, max_steps=1, log_trees=True),
        ScriptedAgent(0, [call("look")], ["Done."]),
        tools=[look],
    )
    trainer.train()
    (line, *_) = read_trees(tmp_path / "trees/trees_000000.jsonl")
    answers = [node for node in SegmentTree.from_dict(line["tree"]).nodes if not node.is_sampled]
    assert answers
    for node in answers:
        assert f"<tool_response>\n{shown}\n" in trainer.processing_class.decode(node.token_ids)


def test_text_that_no_tokenizer_takes(tmp_path: Path) -> None:
    """A model can write half a surrogate pair as a name or an argument, and the answer says it again."""
    half = '{"name": "echo", "arguments": {"text": "\\ud83d"}}', '{"name": "\\ud83d", "arguments": {}}'
    first = [f"<tool_call>\n{body}\n</tool_call>" for body in half]
    trainer = tool_trainer(
        SpyTrainer,
        tool_config(tmp_path, max_steps=1, log_trees=True),
        ScriptedAgent(0, first, ["Done."]),
        tools=[echo],
    )
    trainer.train()
    assert answers_of(trainer) == {"??", "{'error': 'Tool \\ud83d not found.'}"}
    assert list(read_trees(tmp_path / "trees/trees_000000.jsonl"))
