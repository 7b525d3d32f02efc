"""What a recipe needs, and whether it fits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import LlavaConfig
from trl import ModelConfig

from tests.support.paths import ROOT
from treepo_trl.apps.doctor import examination
from treepo_trl.apps.doctor.child import kernel_names, training_names
from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError, Finding
from treepo_trl.apps.doctor.needs import Needs, everything
from treepo_trl.commands import doctor
from treepo_trl.policy.starting_adapter import new_adapter_config


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card"),
    pytest.mark.needs_vllm,
]

RECIPES = ROOT / "examples/cli_configs"
QUICKSTART = ROOT / "src/treepo_trl/quickstart/recipe.yaml"


def needs_of(file: Path) -> Needs:
    return doctor._recipe(["--config", str(file)], "any")[0]


def written(folder: Path, **settings: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), "report_to": "none", **settings}))
    return file


def checks_of(needs: Needs) -> list[str]:
    return [*kernel_names(needs), *training_names(needs)]


ENGINE = ["engine", "same model"]


def test_without_a_recipe_everything_is_checked() -> None:
    names = ["number type", "packed update (sdpa)", "packed update (flex)", "4-bit"]
    assert checks_of(everything("any")) == [*names, *ENGINE, "adapter moves the engine", "sleep and wake", "planner"]


@pytest.mark.parametrize(
    ("recipe", "more", "less"),
    [
        ("qwen2.5-7b-qlora-24gb", ["4-bit", "adapter moves the engine"], ["sleep and wake"]),
        ("qwen2.5-1.5b-lora-12gb", ["adapter moves the engine"], ["4-bit", "sleep and wake"]),
        ("paper-qwen2.5-7b", ["sleep and wake"], ["4-bit", "adapter moves the engine"]),
        ("quickstart", ["packed update (sdpa)"], ["4-bit", "adapter moves the engine", "sleep and wake"]),
    ],
)
def test_a_recipe_is_checked_for_what_it_needs(recipe: str, more: list[str], less: list[str]) -> None:
    file = QUICKSTART if recipe == "quickstart" else RECIPES / f"{recipe}.yaml"
    names = checks_of(needs_of(file))
    assert {"number type", *ENGINE, *more} <= set(names)
    assert not set(less) & set(names)


def test_packages_of_a_recipe(tmp_path: Path) -> None:
    base = {"torch", "trl", "transformers", "accelerate"}
    assert set(needs_of(written(tmp_path, bf16=False)).packages) == base
    assert set(needs_of(written(tmp_path, use_peft=True, optim="adamw_8bit")).packages) == {
        *base,
        "peft",
        "bitsandbytes",
    }
    assert set(needs_of(RECIPES / "qwen2.5-7b-qlora-24gb.yaml").packages) == {
        *base,
        "peft",
        "vllm",
        "bitsandbytes",
        "vllm-bnb-plugin",
    }


@pytest.mark.parametrize(
    ("settings", "number_type"),
    [({}, "bfloat16"), ({"fp16": True}, "float16"), ({"bf16": False}, "float32"), ({"bf16": True}, "bfloat16")],
)
def test_number_type_of_a_recipe(settings: dict[str, Any], number_type: str, tmp_path: Path) -> None:
    assert needs_of(written(tmp_path, **settings)).number_type == number_type
    assert not needs_of(written(tmp_path, **settings)).use_cpu
    assert needs_of(written(tmp_path, **settings, use_cpu=True)).use_cpu


def test_a_packing_that_is_named_is_the_only_one(tmp_path: Path) -> None:
    assert needs_of(written(tmp_path, tree_packing="sdpa")).backends == ["sdpa"]
    assert needs_of(written(tmp_path, tree_packing="off")).backends == []


# Memory


def memory_of(small_model_dir: str, card_gib: float | None, **settings: Any) -> str:
    given = {"bf16": False, "vllm_gpu_memory_utilization": 0.3, "max_completion_length": 64, **settings}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    options += [] if card_gib is None else ["--card_gib", str(card_gib)]
    memory = doctor._recipe(options, small_model_dir).memory
    assert memory is not None
    return memory()


def test_a_recipe_that_does_not_fit_the_card(small_model_dir: str) -> None:
    with pytest.raises(BrokenError, match=r"The update takes \d\.\d GiB of the card's 1\.0\.") as error:
        memory_of(small_model_dir, 1)
    assert "`gradient_checkpointing=True`" in error.value.remedy
    assert "at most, of 24.0" in memory_of(small_model_dir, 24)


def test_a_recipe_that_goes_on_from_an_adapter(
    tmp_path: Path, small_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of rank 4 on queries and values is planned and checked, not all weights."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    config.base_model_name_or_path = small_model_dir
    config.save_pretrained(str(tmp_path / "sft"))
    planned = []
    plan_training = doctor.plan_training
    monkeypatch.setattr(doctor, "plan_training", lambda *given: planned.append(plan_training(*given)) or planned[-1])
    file = written(tmp_path, adapter_name_or_path=str(tmp_path / "sft"), bf16=False, max_completion_length=64)
    needs, memory, *_ = doctor._recipe(["--config", str(file), "--card_gib", "24"], "any")
    assert memory is not None
    assert "at most, of 24.0" in memory()
    assert planned[0].policy["adapter"] == 4 * 30 * 4 * ((576 + 576) + (576 + 192))
    assert needs.has_adapter
    assert (needs.model_settings["lora_r"], needs.model_settings["lora_alpha"]) == (4, 8)
    assert "peft" in needs.packages


def test_without_a_card_memory_is_unknown(small_model_dir: str) -> None:
    with pytest.raises(CannotRunError, match="`--card_gib 24`"):
        memory_of(small_model_dir, None)


def test_a_model_whose_config_is_not_to_be_had() -> None:
    with pytest.raises(CannotRunError, match="the config of the recipe's model cannot be read"):
        memory_of("nobody/no-model-here", 24)  # the tests have no hub


def test_a_training_that_is_not_counted(small_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` goes on with it, and so nothing is broken; but what is planned for must be counted."""
    with pytest.raises(CannotRunError, match=r"goes on without: Weights in 8 bits .* are not planned yet"):
        memory_of(small_model_dir, 24, load_in_8bit=True)
    with pytest.raises(BrokenError, match="'auto'`, but this training cannot be planned: Weights in 8 bits"):
        memory_of(small_model_dir, 24, load_in_8bit=True, use_vllm=True, vllm_gpu_memory_utilization="auto")

    def fails(card: float) -> tuple[list[str], float]:
        raise NotImplementedError("aten::_local_scalar_dense on the meta device")

    with pytest.raises(CannotRunError, match="goes on without: NotImplementedError: aten"):
        examination.check_memory(fails, 8 * 2**30, None)


def test_a_model_that_reads_images_is_not_counted(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(CannotRunError, match="goes on without: Models of type llava are no causal language models"):
        memory_of(str(tmp_path), 24)


def test_what_no_training_goes_on_with_is_broken(small_model_dir: str) -> None:
    """A model that is not there, and modules that it has not."""
    for settings, cause in (
        ({"model_name_or_path": "./gone"}, "looks like a folder, but there is none"),
        ({"use_peft": True, "lora_target_modules": "qkv_proj"}, "Target modules .*qkv_proj.* not found"),
    ):
        with pytest.raises(BrokenError, match=cause) as error:
            memory_of(small_model_dir, 24, **settings)
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


def test_a_card_that_others_use() -> None:
    def check(free: float) -> str:
        return examination.check_memory(lambda card: ([], 5 * 2**30), 8 * 2**30, free * 2**30)

    assert "5.0 GiB" in check(6)
    with pytest.raises(BrokenError, match=r"takes 5\.0 GiB at most, and 4\.0 of the card's 8\.0 are free") as error:
        check(4)
    assert "nvidia-smi" in error.value.remedy


# The command


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, broken: str | None = None) -> list[str]:
    """The checks that a command runs, in processes that are not started here."""
    asked: list[str] = []

    def group(_: str, names: list[str], needs: Needs) -> list[Finding]:
        asked.extend(names)
        return [Finding(name, "broken" if name == broken else "ok", "seen", "Mend it.") for name in names]

    monkeypatch.setattr(examination, "run_group", group)
    doctor.main(argv)
    return asked


def test_json_alone_is_printed(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked = run(["--json", "--model_name_or_path", tiny_model_dir], monkeypatch)
    read = json.loads(capsys.readouterr().out)
    assert [check["check"] for check in read["checks"]] == ["versions", *asked]
    assert read["exit_status"] == 0
    assert {"torch", "vllm", "card", "memory"} <= set(read["environment"])


def test_something_broken_is_exit_status_1(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        run(["--model_name_or_path", tiny_model_dir], monkeypatch, broken="4-bit")
    assert end.value.code == 1
    assert "Broken: 4-bit." in capsys.readouterr().out


def test_a_recipe_that_does_not_fit_is_exit_status_1(
    small_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = written(tmp_path, bf16=False)
    with pytest.raises(SystemExit) as end:
        run(["--config", str(file), "--model_name_or_path", small_model_dir, "--card_gib", "1"], monkeypatch)
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
    monkeypatch.setattr(doctor, "small_model", lambda folder: tiny_model_dir)
    with pytest.raises(SystemExit, match=message):
        doctor.main(argv)
