"""What is said where an engine does not start: the remedy of the error, and no other."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.error import NoMatchingPeftModuleError
from transformers import LlavaConfig

from tests.doctor.test_recipes import needs_of, written
from treepo_trl.apps.doctor.engine_errors import engine_error, remedy_for
from treepo_trl.apps.doctor.findings import BrokenError
from treepo_trl.apps.doctor.needs import Needs, everything
from treepo_trl.apps.doctor.packed_update import check_packed
from treepo_trl.apps.doctor.target_modules import with_modules_of_model
from treepo_trl.apps.doctor.training import SmallTraining


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card"),
    pytest.mark.needs_vllm,
]

SETTING = "Change the setting that it names."


def lora(model: str, *modules: str, is_stand_in: bool = False, **training: Any) -> Needs:
    settings = {"use_peft": True, "lora_r": 4, "lora_target_modules": list(modules)}
    needs = Needs(model, {"use_vllm": False, **training}, settings, "float32", use_cpu=True, is_recipe=True)
    return replace(needs, is_stand_in=is_stand_in)


def error_of(needs: Needs, folder: Path) -> BrokenError:
    with pytest.raises(BrokenError) as error:
        SmallTraining(needs, folder).check_engine()
    return error.value


def test_a_library_that_is_not_there_is_no_model_that_is_not_there(tiny_model_dir: str) -> None:
    """Both are an `OSError` without a number."""
    with pytest.raises(OSError, match="no-such-library") as error:
        ctypes.CDLL("no-such-library.so.1")
    assert error.value.errno is None
    found = engine_error(error.value, lora(tiny_model_dir))
    assert "cannot be read" not in str(found)
    assert "--model_name_or_path" not in found.remedy


def test_a_stand_in_that_is_loaded_in_another_way_keeps_the_modules(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    needs = lora(str(tmp_path), "qkv_proj", is_stand_in=True)
    assert with_modules_of_model(needs) == (needs, None)


# An adapter on a model that it was not written for


def test_modules_that_a_stand_in_has_not(tiny_model_dir: str, tmp_path: Path) -> None:
    """Phi-3 joins what other families keep apart."""
    needs = lora(tiny_model_dir, "qkv_proj", "gate_up_proj", is_stand_in=True)
    training = SmallTraining(needs, tmp_path)
    seen = training.check_engine()
    assert seen.endswith("; LoRA on all linear layers, as this model has no gate_up_proj, qkv_proj")
    adapted = training.trainer.model.peft_config["default"].target_modules
    assert {"q_proj", "o_proj", "down_proj"} <= {name.rpartition(".")[2] for name in adapted}


@pytest.mark.parametrize("modules", [["q_proj", "qkv_proj"], [r".*\.q_proj"], ["all-linear"]])
def test_modules_that_a_stand_in_has(modules: list[str], tiny_model_dir: str, tmp_path: Path) -> None:
    training = SmallTraining(lora(tiny_model_dir, *modules, is_stand_in=True), tmp_path)
    assert "LoRA on all linear layers" not in training.check_engine()


def test_modules_that_the_recipes_own_model_has_not(tiny_model_dir: str, tmp_path: Path) -> None:
    error = error_of(lora(tiny_model_dir, "qkv_proj", "gate_up_proj"), tmp_path)
    assert "Target modules" in str(error)
    assert error.remedy == SETTING


def test_a_recipe_for_another_model_is_checked_on_a_stand_in(tmp_path: Path) -> None:
    assert needs_of(written(tmp_path, model_name_or_path="microsoft/Phi-3-mini-4k-instruct")).is_stand_in
    assert not needs_of(written(tmp_path, model_name_or_path="any")).is_stand_in
    assert not needs_of(written(tmp_path)).is_stand_in


def test_8_bits_are_asked_for_and_not_compared(tiny_model_dir: str, tmp_path: Path) -> None:
    """Their rounding depends on what else is in a batch."""
    needs = lora(tiny_model_dir, "q_proj", "v_proj")
    needs = replace(needs, model_settings={**needs.model_settings, "load_in_8bit": True})
    training = SmallTraining(needs, tmp_path)
    training.check_engine()
    assert "differ by 0.0000 nats" in training.check_same_model()


# Remedies


def test_the_packages_own_errors_carry_their_remedy(tiny_model_dir: str, tmp_path: Path) -> None:
    needs = lora(tiny_model_dir, "q_proj", "v_proj", use_vllm=True, vllm_engine_kwargs={"no_such": 1})
    error = error_of(needs, tmp_path)
    assert "`vllm_engine_kwargs` has no_such" in str(error)
    assert error.remedy == SETTING
    dora = lora(tiny_model_dir, "q_proj", "v_proj", use_vllm=True)
    error = error_of(replace(dora, model_settings={**dora.model_settings, "use_dora": True}), tmp_path)
    assert "`use_dora=True`" in str(error)
    assert error.remedy == SETTING


def test_a_model_that_cannot_be_read(tiny_model_dir: str, tmp_path: Path) -> None:
    """The last line of transformers is about the internet connection, and names no model."""
    for needs in (lora("nobody/no-model-here", "q_proj"), everything("nobody/no-model-here")):
        error = error_of(needs, tmp_path)
        assert str(error).startswith("The model `nobody/no-model-here` cannot be read: OSError: ")
        assert error.remedy.startswith("Check `--model_name_or_path`")
    with pytest.raises(BrokenError, match=r"^The model `nobody/no-model-here` cannot be read") as caught:
        check_packed(everything("nobody/no-model-here"), "sdpa")
    assert caught.value.remedy.startswith("Check `--model_name_or_path`")


def test_an_error_of_vllm_is_about_its_version() -> None:
    needs = everything("any")

    def raised(source: str, package: str, error: Exception) -> Exception:
        names: dict[str, Any] = {"__name__": f"{package}.module", "error": error}
        with pytest.raises(type(error)) as caught:
            exec(source, names)
        return caught.value

    window = "vllm<=0.31.0,>=0.22.0"
    assert window in remedy_for(raised("raise error", "vllm", ValueError("No such backend")), needs)
    assert window in remedy_for(raised("raise error", "vllm", RuntimeError("undefined symbol")), needs)
    # A call that another version does not take is no setting, though this package makes it.
    assert window in remedy_for(raised("(lambda: 0)(seed=1)", "treepo_trl", TypeError("<lambda>() got an")), needs)
    assert remedy_for(raised("raise error", "peft", NoMatchingPeftModuleError("Target modules")), needs) == SETTING
    assert "`transformers`" in remedy_for(raised("raise error", "transformers", KeyError("rope")), needs)
