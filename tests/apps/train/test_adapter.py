"""`treepo-trl train` and `plan` that go on from an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

from tests.support.models import make_model, make_tokenizer
from tests.support.sample_runs import fail_to_build
from tests.support.train_runs import arguments as train_arguments
from treepo_trl.apps.plan import command as plan
from treepo_trl.apps.train import command as train
from treepo_trl.apps.train.adapter import starting_adapter
from treepo_trl.apps.train.command import main
from treepo_trl.command_line.arguments import TreePOScriptArguments
from treepo_trl.policy.starting_adapter import check_fits, read_adapter_config


@pytest.fixture
def folder(training_folder: Path, tiny_model_dir: str) -> Path:
    """The adapter `sft` of rank 4 with a tokenizer of its own, beside data and rewards."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained("sft")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'of the sft' }}"
    tokenizer.save_pretrained("sft")
    return training_folder


def arguments(**changes: Any) -> list[str]:
    return train_arguments(None, **{"adapter_name_or_path": "sft", "max_steps": 1, "beta": 0.1, **changes})


def test_a_training_goes_on_from_the_adapter(folder: Path, tiny_model_dir: str) -> None:
    """The base is the adapter's own, and so are rank, layers and chat template."""
    main(arguments())
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("sft", "out"))
    assert before.keys() == after.keys()
    moved = max((before[name] - after[name]).abs().max() for name in before)
    assert 1e-5 < moved < 0.1  # a new adapter's `lora_B` would start at zero
    saved = json.loads((folder / "out/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["base_model_name_or_path"]) == (4, 16, tiny_model_dir)
    assert "of the sft" in (folder / "out/chat_template.jinja").read_text()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), "out")


def test_a_recipe_for_all_layers_suits_an_adapter_on_them(folder: Path, tiny_model_dir: str) -> None:
    """PEFT writes the names of the layers in place of `all-linear`, so only the model could tell the two apart."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained("sft")
    model_args = ModelConfig(lora_target_modules=["all-linear"])
    found = starting_adapter(TreePOScriptArguments(dataset_name="x", adapter_name_or_path="sft"), model_args)
    assert found is not None
    assert any(name.endswith("q_proj") for name in found.target_modules or ())


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_the_base_is_trusted_if_asked(
    folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    (folder / "own").mkdir()
    (folder / "own/own_llama.py").write_text(CODE)
    classes = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnForCausalLM"}
    settings = json.loads((Path(tiny_model_dir) / "config.json").read_text())
    settings |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "own/config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained("own", trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        check_fits("sft", read_adapter_config("sft"), "own", config)
    check_fits("sft", read_adapter_config("sft"), "own", config, trust_remote_code=True)


def wrong_layer(folder: Path) -> None:
    state = load_file(folder / "sft/adapter_model.safetensors")
    name = next(name for name in state if "layers.1.self_attn.v_proj.lora_B" in name)
    save_file({**state, name: torch.zeros(7, 4)}, folder / "sft/adapter_model.safetensors")


def other_layers(folder: Path) -> None:
    state = load_file(folder / "sft/adapter_model.safetensors")
    save_file(
        {name: value for name, value in state.items() if "layers.1" not in name},
        folder / "sft/adapter_model.safetensors",
    )


def cut_short(folder: Path) -> None:
    path = folder / "sft/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_kind(folder: Path) -> None:
    path = folder / "sft/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}))


def in_a_subfolder(folder: Path) -> None:
    (folder / "sft").rename(folder / "moved")
    (folder / "sft").mkdir()
    (folder / "moved").rename(folder / "sft/checkpoint-3")


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (None, {"use_peft": True, "lora_r": 32}, r"`--lora_r 32`, but the adapter `sft` has `r=4`.*Leave `--lora_r`"),
        (None, {"lora_target_modules": ["o_proj"]}, r"`--lora_target_modules o_proj`.*\['q_proj', 'v_proj'\]"),
        (None, {"adapter_name_or_path": "./none"}, r"`./none` holds no adapter"),
        (in_a_subfolder, {}, r"`sft` holds no adapter.*It has checkpoint-3: name one of these"),
        (
            None,
            {"model_name_or_path": "other"},
            r"the base `other`: .*layers.0.*lora_A.*\[4, 64\].*needs \[4, 128\].*and 1 more. It was for `.*tiny-model",
        ),
        (
            None,
            {"model_name_or_path": "gpt2"},
            r"does not fit the base `gpt2`.*Target modules.*It was for `.*tiny-model",
        ),
        (wrong_layer, {}, r"layers.1.self_attn.v_proj.lora_B.weight has shape \[7, 4\] and the base needs \[32, 4\]"),
        (other_layers, {}, r"layers.1.*is missing in it; .*and 1 more"),
        (cut_short, {}, r"The weights of the adapter `sft` cannot be read"),
        (other_kind, {"use_vllm": True, "vllm_mode": "colocate"}, r"vLLM serves no adapters with `modules_to_save"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ("-".join(value) if isinstance(value, dict) else ""),
)
def test_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, changes: dict[str, Any], message: str
) -> None:
    """In one line, and before the base is loaded."""
    if "use_vllm" in changes:
        pytest.importorskip("vllm")
    monkeypatch.setattr(train, "load_with_adapter", fail_to_build)
    make_model(hidden_size=128).config.save_pretrained("other")
    (folder / "gpt2").mkdir()
    (folder / "gpt2/config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    if damage is not None:
        damage(folder)
    with pytest.raises(SystemExit, match="^treepo-trl: error: .*" + message) as error:
        main(arguments(**changes))
    assert "\n" not in str(error.value.code)


def test_the_plan_counts_the_adapters_rank_and_its_reference(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    By hand: rank 4 on two layers, query 64 to 64 and value 64 to 32, in float32.

    The GPU is made large, because reserve and cache are not what is tested.
    """
    seen = []
    plan_memory = plan.plan_memory
    monkeypatch.setattr(plan, "plan_memory", lambda *given: seen.append(plan_memory(*given)) or seen[-1])
    plan.main(arguments(use_cpu=None, bf16=None, card_gib=24))
    numel = 2 * 4 * ((64 + 64) + (64 + 32))
    assert seen[0].policy["adapter"] == seen[0].policy["reference adapter"] == 4 * numel
    assert "reference adapter" in capsys.readouterr().out
