"""What the user may say about the engine beside TRL's settings."""

from pathlib import Path
from typing import Any

import pytest

from treepo_trl import TreePOConfig
from treepo_trl.policy.engine_options import OWNED, check_engine_options, engine_options


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
    assert engine_options(make(tmp_path)) == ({name: None} if hasattr(EngineArgs, name) else {})
    assert engine_options(make(tmp_path, vllm_engine_kwargs={name: 0, "seed_of_nothing": 1})) == {
        name: 0,
        "seed_of_nothing": 1,
    }


@pytest.mark.parametrize("name", OWNED)
def test_what_the_trainer_sets_is_refused_with_the_setting_to_use(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`vllm_engine_kwargs` has {name}, which is not free: "):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={name: 1}))


def test_settings_that_are_named_exist() -> None:
    named = {word.strip("`") for text in OWNED.values() for word in text.split() if word.startswith("`vllm_")}
    assert named <= {*TreePOConfig.__dataclass_fields__}
    assert len(named) > 5


def test_options_without_an_engine_or_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`use_vllm` is false"):
        check_engine_options(make(tmp_path, use_vllm=False, vllm_engine_kwargs={"dtype": "float32"}))
    with pytest.raises(ValueError, match=r"is 'auto', which `treepo-trl train` plans"):
        check_engine_options(make(tmp_path, vllm_gpu_memory_utilization="auto"))


def test_guessed_tokens_are_refused_on_a_processor(tmp_path: Path) -> None:
    """For a fault of vLLM that `tests/engines/test_vllm.py` shows."""
    guesses = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}
    with pytest.raises(ValueError, match="has speculative_config, and this training runs on a processor"):
        check_engine_options(make(tmp_path, vllm_engine_kwargs=guesses))
    check_engine_options(make(tmp_path, vllm_engine_kwargs={"speculative_config": None}))


def test_names_that_vllm_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cache_dtype": "auto"}))
    with pytest.raises(ValueError, match="has kv_cash_dtype, which this vLLM does not know"):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cash_dtype": "auto"}))
