"""Engines built from arguments: EOS tokens, types, adapters and seeds."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.sample_runs import save_adapter
from treepo_trl.command_line.engine import EngineArguments, build_engine, eos_token_ids, load_tokenizer
from treepo_trl.engines import SamplingOptions, SegmentRequest


@pytest.fixture
def model_dir(tiny_model_dir: str, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return tmp_path / "model"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def eos_of(folder: Path) -> list[int]:
    arguments = EngineArguments(model_name_or_path=str(folder))
    return eos_token_ids(arguments, load_tokenizer(arguments))


def test_eos_tokens_of_tokenizer_and_generation_config(model_dir: Path) -> None:
    assert eos_of(model_dir) == [0]
    change_json(model_dir / "generation_config.json", eos_token_id=[7, 3])
    assert eos_of(model_dir) == [0, 3, 7]


def test_without_a_generation_config_the_models_config_counts(model_dir: Path) -> None:
    """As in `GRPOTrainer`, which asks the loaded model."""
    (model_dir / "generation_config.json").unlink()
    change_json(model_dir / "config.json", eos_token_id=9)
    assert AutoModelForCausalLM.from_pretrained(model_dir).generation_config.eos_token_id == 9
    assert eos_of(model_dir) == [0, 9]


def test_no_eos_token_anywhere(model_dir: Path) -> None:
    change_json(model_dir / "generation_config.json", eos_token_id=None)
    arguments = EngineArguments(model_name_or_path=str(model_dir))
    tokenizer = load_tokenizer(arguments)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no EOS token"):
        eos_token_ids(arguments, tokenizer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "sglang"}, "`engine` is 'sglang'. Choose one of 'auto', 'vllm', 'transformers'"),
        ({"dtype": "int3"}, "`dtype` is 'int3'. Choose one of 'auto', 'bfloat16', 'float16', 'float32'"),
    ],
)
def test_choices(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineArguments(**changes)


def test_without_vllm(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes transformers, and asking for vLLM says how to get it."""
    monkeypatch.setattr(importlib.import_module("trl.import_utils"), "is_vllm_available", lambda: False)
    engine = build_engine(EngineArguments(tiny_model_dir), [0], SamplingOptions())
    assert type(engine).__name__ == "TransformersEngine"
    with pytest.raises(ImportError, match=r"treepo-trl\[vllm\].*transformers"):
        build_engine(EngineArguments(tiny_model_dir, engine="vllm"), [0], SamplingOptions())


def test_type_of_the_weights(tiny_model_dir: str) -> None:
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        arguments = EngineArguments(tiny_model_dir, engine="transformers", dtype=dtype)  # pyright: ignore
        assert build_engine(arguments, [0], SamplingOptions()).model.dtype == expected


def test_an_adapter_is_sampled_with(tiny_model_dir: str, tmp_path: Path) -> None:
    """Greedy completions are those of transformers' own `generate` with the adapter, and differ from the model's."""
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted.load_adapter(str(tmp_path / "adapter"))

    def greedy(model: Any) -> list[int]:
        prompt = torch.tensor([[6, 7, 8]])
        return model.generate(prompt, do_sample=False, max_new_tokens=8)[0, 3:].tolist()

    arguments = EngineArguments(tiny_model_dir, engine="transformers", adapter_name_or_path=str(tmp_path / "adapter"))
    engine = build_engine(arguments, [0], SamplingOptions(temperature=0.0))
    (result,) = engine.complete([SegmentRequest(0, [6, 7, 8], 8)])
    assert result.token_ids == greedy(adapted) != greedy(plain)


def test_an_adapter_is_no_model(tiny_model_dir: str, tmp_path: Path) -> None:
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "adapter")  # as the trainer saves it
    with pytest.raises(ValueError, match=r"is an adapter.*--adapter_name_or_path"):
        load_tokenizer(EngineArguments(str(tmp_path / "adapter")))
