"""What a recipe needs, whether it fits, and the command as users run it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlavaConfig
from trl import ModelConfig

from tests.support.paths import ROOT
from tests.support.recipes import everything, recipe_of, written
from treepo_trl.apps.doctor import checks, command, recipe
from treepo_trl.apps.doctor.checks import check_memory
from treepo_trl.apps.doctor.child import step_names
from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError, Finding
from treepo_trl.apps.doctor.recipe import Recipe, read
from treepo_trl.apps.doctor.step import _model_settings
from treepo_trl.policy.starting_adapter import new_adapter_config


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card"),
    pytest.mark.needs_vllm,
]

BASE = {"torch", "trl", "transformers", "accelerate"}


def test_packages_of_a_recipe(tmp_path: Path, tiny_model_dir: str) -> None:
    def packages(**settings: Any) -> set[str]:
        return set(recipe_of(written(tmp_path, bf16=False, **settings), tiny_model_dir).packages)

    assert packages() == BASE
    assert packages(use_peft=True, optim="adamw_8bit") == {*BASE, "peft", "bitsandbytes"}
    assert packages(load_in_8bit=True) == {*BASE, "bitsandbytes"}
    of_4_bits = {*BASE, "peft", "vllm", "bitsandbytes", "vllm-bnb-plugin"}
    qlora = recipe_of(ROOT / "examples/cli_configs/qwen2.5-7b-qlora-24gb.yaml", tiny_model_dir)
    assert set(qlora.packages) == of_4_bits
    assert set(everything(tiny_model_dir).packages) == of_4_bits


def test_4_bits_are_tried_where_no_recipe_has_them_in_its_step(tmp_path: Path, tiny_model_dir: str) -> None:
    assert step_names(everything(tiny_model_dir)) == ["engine", "small step", "4-bit"]
    assert step_names(recipe_of(written(tmp_path), tiny_model_dir)) == ["engine", "small step"]


@pytest.mark.parametrize(
    ("settings", "number_type"),
    [({}, "bfloat16"), ({"fp16": True}, "float16"), ({"bf16": False}, "float32"), ({"bf16": True}, "bfloat16")],
)
def test_number_type_of_a_recipe(
    settings: dict[str, Any], number_type: str, tmp_path: Path, tiny_model_dir: str
) -> None:
    assert recipe_of(written(tmp_path, **settings), tiny_model_dir).number_type == number_type
    assert not recipe_of(written(tmp_path, **settings), tiny_model_dir).use_cpu
    assert recipe_of(written(tmp_path, **settings, use_cpu=True), tiny_model_dir).use_cpu


@pytest.mark.parametrize(
    ("argv", "settings"), [([], {"fp16": True}), (["--fp16", "true"], {}), (["--fp16"], {}), (["--fp16=true"], {})]
)
def test_two_number_types_are_refused_as_transformers_does(
    argv: list[str], settings: dict[str, Any], tmp_path: Path, tiny_model_dir: str
) -> None:
    with pytest.raises(ValueError, match=r"`fp16` and `bf16` are both true\. Set one of them to false"):
        recipe_of(written(tmp_path, bf16=True, **settings), tiny_model_dir, *argv)


# Memory


def memory_of(small_model_dir: str, card_gib: float | None, **settings: Any) -> str:
    given = {"bf16": False, "vllm_gpu_memory_utilization": 0.3, "max_completion_length": 64, **settings}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    options += [] if card_gib is None else ["--card_gib", str(card_gib)]
    return check_memory(read(command.command_parser(), ["--model_name_or_path", small_model_dir, *options]))


def test_a_recipe_that_does_not_fit_the_card(small_model_dir: str) -> None:
    with pytest.raises(BrokenError, match=r"The update takes \d\.\d GiB of the card's 1\.0\.") as error:
        memory_of(small_model_dir, 1)
    assert "`gradient_checkpointing=True`" in error.value.remedy
    assert "at most, of 24.0" in memory_of(small_model_dir, 24)


def test_a_recipe_that_goes_on_from_an_adapter(
    tmp_path: Path, small_model_dir: str, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of rank 4 on queries and values is planned and checked, not all weights."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    config.base_model_name_or_path = small_model_dir
    config.save_pretrained(str(tmp_path / "sft"))
    planned = []
    plan_training = checks.plan_training
    monkeypatch.setattr(checks, "plan_training", lambda *given: planned.append(plan_training(*given)) or planned[-1])
    file = written(tmp_path, adapter_name_or_path=str(tmp_path / "sft"), bf16=False, max_completion_length=64)
    found = recipe_of(file, tiny_model_dir, "--card_gib", "24")
    assert "at most, of 24.0" in check_memory(found)
    assert planned[0].policy["adapter"] == 4 * 30 * 4 * ((576 + 576) + (576 + 192))
    of_step = _model_settings(found)
    assert (of_step["use_peft"], of_step["lora_r"], of_step["lora_alpha"]) == (True, 4, 8)
    assert "peft" in found.packages


def test_without_a_card_memory_is_unknown(small_model_dir: str) -> None:
    with pytest.raises(CannotRunError, match="`--card_gib 24`"):
        memory_of(small_model_dir, None)


def test_a_model_whose_config_is_not_to_be_had(tmp_path: Path, tiny_model_dir: str) -> None:
    file = written(tmp_path, model_name_or_path="nobody/no-model-here", bf16=False)
    with pytest.raises(CannotRunError, match="the config of the recipe's model cannot be read"):
        check_memory(recipe_of(file, tiny_model_dir, "--card_gib", "24"))


def test_a_training_that_is_not_counted(small_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` goes on with it, and so nothing is broken; but what is planned for must be counted."""
    with pytest.raises(CannotRunError, match=r"goes on without: Weights in 8 bits .* are not planned yet"):
        memory_of(small_model_dir, 24, load_in_8bit=True)
    with pytest.raises(BrokenError, match="'auto'`, but this training cannot be planned: Weights in 8 bits"):
        memory_of(small_model_dir, 24, load_in_8bit=True, use_vllm=True, vllm_gpu_memory_utilization="auto")
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(CannotRunError, match="goes on without: Models of type llava are no causal language models"):
        memory_of(str(tmp_path), 24)

    def fails(*_: object) -> None:
        raise NotImplementedError("aten::_local_scalar_dense on the meta device")

    monkeypatch.setattr(checks, "plan_training", fails)
    with pytest.raises(CannotRunError, match="goes on without: NotImplementedError: aten"):
        memory_of(small_model_dir, 8)


def test_what_no_training_goes_on_with_is_broken(small_model_dir: str, tmp_path: Path) -> None:
    """A model that is not there, and modules that it has not."""
    gone = written(tmp_path, model_name_or_path="./gone", bf16=False)
    with pytest.raises(BrokenError, match="looks like a folder, but there is none"):
        check_memory(recipe_of(gone, small_model_dir, "--card_gib", "24"))
    with pytest.raises(BrokenError, match=r"Target modules .*qkv_proj.* not found") as error:
        memory_of(small_model_dir, 24, use_peft=True, lora_target_modules="qkv_proj")
    assert error.value.remedy == "Change the setting that it names."


def test_one_module_is_a_name_and_no_pattern(small_model_dir: str) -> None:
    """TRL makes a list of one name the name, which PEFT takes for a pattern of whole paths."""
    for name in ("q_proj", "self_attn.q_proj"):
        assert "at most, of 24.0" in memory_of(small_model_dir, 24, use_peft=True, lora_target_modules=name)


@pytest.mark.parametrize(
    ("given", "modules"),
    [
        (None, None),  # those that PEFT knows for the model
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*\.q_proj"], r".*\.q_proj"),
    ],
)
def test_what_is_no_single_name_stays_as_it_is(given: Any, modules: Any) -> None:
    config: Any = new_adapter_config(ModelConfig("any", use_peft=True, lora_target_modules=given))
    assert config.target_modules == modules


def test_a_card_that_others_use(tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe_of(written(tmp_path, bf16=False), tiny_model_dir)
    plan = SimpleNamespace(problems=list, rollout=5 * 2**30, update=2**30)
    monkeypatch.setattr(checks, "plan_training", lambda *_: plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * 2**30, 8 * 2**30))
    assert "5.0 GiB" in check_memory(found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * 2**30, 8 * 2**30))
    with pytest.raises(BrokenError, match=r"takes 5\.0 GiB at most, and 4\.0 of the card's 8\.0 are free") as error:
        check_memory(found)
    assert "nvidia-smi" in error.value.remedy


# The command


@pytest.fixture
def without_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is right, and not made."""

    def run_step(recipe: Recipe) -> list[Finding]:
        return [Finding(name, "ok", "seen") for name in step_names(recipe)]

    monkeypatch.setattr(command, "run_step", run_step)


def test_json_alone_is_printed(tiny_model_dir: str, without_child: None, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--json", "--model_name_or_path", tiny_model_dir])
    read = json.loads(capsys.readouterr().out)
    assert [each["check"] for each in read["checks"]] == ["versions", "number type", "engine", "small step", "4-bit"]
    assert read["exit_status"] == 0
    assert {"torch", "vllm", "card", "memory"} <= set(read["environment"])


def test_a_recipe_that_does_not_fit_is_exit_status_1(
    small_model_dir: str, tmp_path: Path, without_child: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, bf16=False)
    with pytest.raises(SystemExit) as end:
        command.main(["--config", str(file), "--model_name_or_path", small_model_dir, "--card_gib", "1"])
    assert end.value.code == 1
    assert "Broken: memory." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--card_gib", "12"], "`--card_gib` is for the plan of a recipe. Add `--config`"),
        (["--config", "gone.yaml"], "`--config gone.yaml` cannot be read"),
        (["--model_name_or_path", "./gone"], "looks like a folder, but there is none"),
    ],
)
def test_bad_arguments(
    argv: list[str], message: str, tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "small_model", lambda folder: tiny_model_dir)
    with pytest.raises(SystemExit, match=message):
        command.main(argv)
