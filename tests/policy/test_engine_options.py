"""What the user may say about the engine beside TRL's settings."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl.generation.vllm_generation import VLLMGeneration

from tests.support.paths import ROOT
from treepo_trl import TreePOConfig
from treepo_trl.engines.vllm import cache_options
from treepo_trl.policy.engine_options import GUESSES, OWNED, check_engine_options, engine_options


FREE = [
    word
    for line in (ROOT / "tests/data/vllm_arguments.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for word in line.split()
]
"""Arguments of vLLM that were read, and are the user's."""
# What changes the engine behind the trainer's back.
REFUSED = {
    *("kv_cache_memory_bytes", "num_gpu_blocks_override", "kv_offloading_size", "kv_transfer_config"),
    *("model_weights", "hf_overrides", "quantization_config", "skip_tokenizer_init", "tokens_only"),
    *("lora_target_modules", "logits_processors", "watermark_config", "data_parallel_rank", "device_ids"),
}


def make(folder: Path, **changes: Any) -> TreePOConfig:
    return TreePOConfig(str(folder), **{"use_cpu": True, "bf16": False, "report_to": [], "use_vllm": True, **changes})


def test_the_engine_computes_in_what_mixed_precision_says(tmp_path: Path) -> None:
    def dtype(**changes: Any) -> object:
        return engine_options(make(tmp_path, **changes)).get("dtype")

    assert dtype() is None
    assert dtype(bf16=True) == "bfloat16"
    assert dtype(fp16=True) == "float16"
    assert dtype(fp16=True, vllm_engine_kwargs={"dtype": "float32"}) == "float32"


def test_decoded_segments_stay_in_the_cache_of_all_layers_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm import EngineArgs

    name = "prefix_cache_retention_interval"
    retention = {name: None} if hasattr(EngineArgs, name) else {}
    assert engine_options(make(tmp_path)) == {"block_size": 32, **retention}
    own = {name: 0, "block_size": 64, "seed_of_nothing": 1}
    assert engine_options(make(tmp_path, vllm_engine_kwargs=own)) == own


def test_blocks_of_a_card_are_vllms(tmp_path: Path) -> None:
    """16 tokens there; on a processor 128, which is longer than many segments."""
    assert "block_size" not in cache_options(on_processor=False)


@pytest.mark.parametrize("name", OWNED)
def test_what_the_trainer_sets_is_refused_with_the_setting_to_use(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`vllm_engine_kwargs` has {name}, which is not free: "):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={name: 1}))


def test_what_trl_gives_the_engine_is_not_the_users() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(VLLMGeneration))))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM"
    ]
    (call,) = calls
    given = {keyword.arg for keyword in call.keywords}
    assert len(given) > 10
    assert given - set(OWNED) == {"max_num_batched_tokens"}  # TRL's guess at a good size; the user may know better


def test_every_argument_of_vllm_was_looked_at() -> None:
    """A new one is put into `OWNED` if it changes what the trainer has planned, checked or set; else into `FREE`."""
    pytest.importorskip("vllm")
    from vllm import EngineArgs

    known, free = {each.name for each in fields(EngineArgs)}, set(FREE)
    assert known - set(OWNED) - free == set()
    assert set(OWNED) & free == set()
    assert set(GUESSES) <= free
    assert set(OWNED) >= REFUSED


def test_settings_that_are_named_exist() -> None:
    named = {word.strip("`") for text in OWNED.values() for word in text.split() if word.startswith("`vllm_")}
    assert named <= {*TreePOConfig.__dataclass_fields__}
    assert len(named) > 5


@pytest.mark.parametrize(
    "guesses",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
        {"spec_method": "ngram", "spec_tokens": 4},
        {"spec_model": "smaller"},
        {"spec_tokens": 4},
    ],
)
def test_guessed_tokens_are_refused_on_a_processor(tmp_path: Path, guesses: dict[str, object]) -> None:
    """For a fault of vLLM that `tests/engines/test_vllm.py` shows."""
    with pytest.raises(ValueError, match=f"has {', '.join(guesses)}, and this training runs on a processor"):
        check_engine_options(make(tmp_path, vllm_engine_kwargs=guesses))


def test_arguments_of_guesses_that_are_none_guess_nothing(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm import EngineArgs

    known = {each.name for each in fields(EngineArgs)}
    check_engine_options(make(tmp_path, vllm_engine_kwargs=dict.fromkeys(known & {*GUESSES})))


def test_names_that_vllm_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cache_dtype": "auto"}))
    with pytest.raises(ValueError, match="has kv_cash_dtype, which this vLLM does not know"):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cash_dtype": "auto"}))
