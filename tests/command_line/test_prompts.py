"""Prompts from files, folders and standard input, and their token ids, with TRL's own as the measure."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from treepo_trl.command_line.arguments import SampleArguments
from treepo_trl.command_line.prompts import load_named_dataset, load_prompts, prompt_token_ids, read_prompts


PROMPTS = ["w1 w2", "w3, 'w4'", "w5"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("suffix", "write", "column"),
    [
        ("jsonl", lambda path: Dataset.from_dict({"prompt": PROMPTS}).to_json(path), "prompt"),
        ("json", lambda path: path.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS])), "prompt"),
        ("csv", lambda path: Dataset.from_dict({"prompt": PROMPTS}).to_csv(path), "prompt"),
        ("parquet", lambda path: Dataset.from_dict({"prompt": PROMPTS}).to_parquet(path), "prompt"),
        ("txt", lambda path: path.write_text("\n".join(PROMPTS) + "\n"), "text"),
    ],
)
def test_every_kind_of_file_holds_the_same_prompts(
    tmp_path: Path, suffix: str, write: Callable[[Path], Any], column: str
) -> None:
    path = tmp_path / f"prompts.{suffix}"
    write(path)
    splits = load_named_dataset(str(path), None, "mine")
    assert list(splits) == ["mine"]
    assert list(splits["mine"][column]) == PROMPTS


def test_saved_folders(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": PROMPTS})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    one = load_named_dataset(str(tmp_path / "one"), None, "mine")
    two = load_named_dataset(str(tmp_path / "two"), None, "mine")
    assert {name: list(split["prompt"]) for name, split in one.items()} == {"mine": PROMPTS}
    assert {name: list(split["prompt"]) for name, split in two.items()} == {"train": PROMPTS, "test": PROMPTS[1:2]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, ["missing.jsonl", "looks like a file", "none"]),
        ("notes.md", "w1", ["notes.md", "'.md'", ".jsonl", ".parquet"]),
        ("empty.jsonl", "", ["empty.jsonl", "is an empty file"]),
        ("broken.jsonl", '{"prompt": "w1"}\n{"prompt": "w2\n', ["broken.jsonl", "no valid json", "row 1"]),
        ("broken.csv", 'a,b\n1,2\n"x', ["broken.csv", "no valid csv", "EOF inside string"]),
        ("broken.parquet", "w1", ["smaller than the minimum"]),
    ],
)
def test_a_file_that_is_no_dataset(tmp_path: Path, name: str, content: str | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        load_named_dataset(str(tmp_path / name), None, "train")


# Standard input


def read(text: str, key: str = "prompt") -> list[Any]:
    return read_prompts(io.StringIO(text), key)


def test_lines_of_text_are_taken_as_they_are_and_blank_lines_skipped() -> None:
    lines = ["w1 w2", "  indented", "trailing  ", "12", "[1, 2]", r"{x \in X}", '"quoted"']
    assert read("\n" + "\n  \n".join(lines) + "\n\n") == lines


def test_json_lines_give_their_key() -> None:
    messages = [{"role": "user", "content": "w1"}]
    rows = [{"prompt": "w1", "answer": 1}, {"prompt": messages, "question": "w2"}]
    assert read("\n\n".join(map(json.dumps, rows))) == ["w1", messages]
    assert read('{"prompt": "w1", "question": "w2"}', key="question") == ["w2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no prompts", "'prompt'", "--dataset_name"]),
        ("\n \n", ["no prompts"]),
        ('{"prompt": "w1"}\n\n{"prompt": "w2\n', ["Line 3", "no JSON object", '{"prompt": "w2']),
        ('w1\n{"prompt": "w2"}', ["Line 1", "no JSON object", "w1"]),
        ('{"prompt": "w1"}\n{"question": "w2", "answer": 2}', ["Line 2", "'prompt'", "question, answer", "column"]),
    ],
)
def test_what_is_wrong_with_standard_input(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words))):
        read(text)


# The prompts of a run


def test_a_terminal_is_told_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("w1\n"))
    assert load_prompts(SampleArguments()) == ["w1"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "one per line" in err
    assert "Ctrl-D" in err


def test_columns_splits_and_the_number_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_dict({"question": ["q1", "q2"], "prompt": ["p1", "p2"]})
    rows.to_json("two.jsonl")
    rows.select_columns(["question"]).to_json("one.jsonl")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("saved")
    assert load_prompts(SampleArguments("two.jsonl")) == ["p1", "p2"]
    assert load_prompts(SampleArguments("two.jsonl", prompt_column="question")) == ["q1", "q2"]
    assert load_prompts(SampleArguments("one.jsonl")) == ["q1", "q2"]
    assert load_prompts(SampleArguments("two.jsonl", max_prompts=1)) == ["p1"]
    assert load_prompts(SampleArguments("two.jsonl", max_prompts=9)) == ["p1", "p2"]
    assert load_prompts(SampleArguments("two.jsonl", dataset_split="mine")) == ["p1", "p2"]
    assert load_prompts(SampleArguments("saved", dataset_split="test")) == ["p2"]


def test_the_column_and_the_number_of_prompts_hold_for_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = '{"question": "q1", "prompt": "p1"}\n{"question": "q2"}\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert load_prompts(SampleArguments(prompt_column="question")) == ["q1", "q2"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\nw2\n"))
    assert load_prompts(SampleArguments(max_prompts=1)) == ["w1"]


# Token ids


def trl_token_ids(prompts: list[Any], tokenizer: Any, **chat_template_kwargs: Any) -> list[list[int]]:
    """What `GRPOTrainer` samples from."""
    settings = {"chat_template": None, "chat_template_kwargs": chat_template_kwargs, "_is_vlm": False}
    settings |= {"processing_class": tokenizer, "tools": None, "environment_factories": None}
    trainer: Any = SimpleNamespace(**settings)
    return GRPOTrainer._tokenize_prompts(trainer, prompts)[0]


@pytest.fixture
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts a BOS token (5, which is w0) in front of text; its chat template writes one of its own."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="w0 $A", special_tokens=[("w0", 5)])
    tokenizer.chat_template = "w0 " + str(tokenizer.chat_template)
    return tokenizer


USER, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


@pytest.mark.parametrize(
    ("prompts", "ids"),  # w0 5, <user> 3, <assistant> 4, w1 6, w2 7
    [
        (["w1 w2", "w3"], [[5, 6, 7], [5, 8]]),
        ([[USER], [USER, ANSWER, USER]], [[5, 3, 6, 4], [5, 3, 6, 4, 7, 3, 6, 4]]),
        *(([[USER, {**ANSWER, "role": role}]], [[5, 3, 6, 4, 7, 4]]) for role in ("assistant", "system", "tool")),
    ],
)
def test_one_bos_and_after_any_role_the_generation_prompt_as_in_trl(
    bos_tokenizer: PreTrainedTokenizerFast, prompts: list[Any], ids: list[list[int]]
) -> None:
    assert prompt_token_ids(prompts, bos_tokenizer) == ids == trl_token_ids(prompts, bos_tokenizer)


def test_arguments_of_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template) + "{% if quiet %}w9{% endif %}"
    prompts = [[USER]]
    assert prompt_token_ids(prompts, tokenizer) == [[3, 6, 4]]
    ids = prompt_token_ids(prompts, tokenizer, {"quiet": True})
    assert ids == [[3, 6, 4, 14]] == trl_token_ids(prompts, tokenizer, quiet=True)


def test_messages_without_a_chat_template_or_that_it_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [[USER], [{"role": "system", "content": "w1"}]]
    tokenizer.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no user') }}{% endif %}"
    with pytest.raises(ValueError, match=r"prompt 1, .*system.*no user"):
        prompt_token_ids(prompts, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prompt_token_ids(prompts, tokenizer)


@pytest.mark.parametrize("prompt", [None, 3, [], ["w1"], [{"from": "user", "value": "w1"}], {"role": "user"}])
def test_what_is_no_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Prompt 1 is {prompt!r}: give text, or a list of messages")):
        prompt_token_ids(["w1", prompt], tokenizer)
