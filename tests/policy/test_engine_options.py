"""What the user may say about the engine beside TRL's settings."""

from pathlib import Path
from typing import Any

import pytest

from treepo_trl import TreePOConfig
from treepo_trl.policy.engine_options import OWNED, check_engine_options, engine_options


def make(folder: Path, **changes: Any) -> TreePOConfig:
    return TreePOConfig(str(folder), **{"use_cpu": True, "bf16": False, "report_to": [], "use_vllm": True, **changes})


def test_the_engine_computes_in_what_mixed_precision_says(tmp_path: Path) -> None:
    given = {"vllm_engine_kwargs": {"seed_of_nothing": 1}}
    assert engine_options(make(tmp_path)) == {}
    assert engine_options(make(tmp_path, bf16=True, **given)) == {"dtype": "bfloat16", "seed_of_nothing": 1}
    assert engine_options(make(tmp_path, fp16=True)) == {"dtype": "float16"}
    assert engine_options(make(tmp_path, fp16=True, vllm_engine_kwargs={"dtype": "float32"})) == {"dtype": "float32"}


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


def test_names_that_vllm_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cache_dtype": "auto"}))
    with pytest.raises(ValueError, match="has kv_cash_dtype, which this vLLM does not know"):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cash_dtype": "auto"}))
