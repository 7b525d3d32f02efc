"""The base of a QLoRA policy written out for the engine, and which form the engine gets."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.models import make_model
from tests.support.processes import run_in_two_processes
from tests.support.qlora import qlora
from treepo_trl.policy.four_bit_base import base_checkpoint, base_state_dict, choose_base_weights, is_4bit


IDS = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    make_model(tie_word_embeddings=request.param == "tied").save_pretrained(tmp_path)
    return str(tmp_path)


FOUR_BITS = [{}, {"bnb_4bit_use_double_quant": False}, {"bnb_4bit_quant_type": "fp4"}]
FLOAT_STORAGE = {"dtype": "bfloat16", "bnb_4bit_quant_storage": "bfloat16"}  # as for FSDP, which shards floats alone


@pytest.mark.parametrize("changes", [*FOUR_BITS, FLOAT_STORAGE])
def test_the_dequantized_checkpoint_is_the_policys_base(folder: str, changes: dict[str, Any]) -> None:
    policy = qlora(folder, **changes)
    assert is_4bit(policy)
    dtype = getattr(torch, changes.get("dtype", "float32"))
    assert {weight.dtype for weight in base_state_dict(policy, "dequantized").values()} == {dtype}
    with base_checkpoint(policy, "dequantized") as written:
        loaded = AutoModelForCausalLM.from_pretrained(written)
        assert not hasattr(loaded.config, "quantization_config")
        assert loaded.dtype == dtype
        assert loaded.generation_config.eos_token_id == 0
        with policy.disable_adapter():
            assert torch.equal(logits(policy), logits(loaded))
        # Neither the adapter nor the checkpoint before quantization.
        assert (logits(policy) - logits(loaded)).abs().max() > 0.1
        assert (logits(AutoModelForCausalLM.from_pretrained(folder)) - logits(loaded)).abs().max() > 0.1
    assert not os.path.exists(written)


@pytest.mark.parametrize("changes", FOUR_BITS)
def test_the_quantized_checkpoint_has_the_policys_own_4_bits(folder: str, changes: dict[str, Any]) -> None:
    policy = qlora(folder, **changes)
    with base_checkpoint(policy, "quantized") as written:
        loaded = AutoModelForCausalLM.from_pretrained(written).train()
    layer, own = loaded.model.layers[0].mlp.up_proj, policy.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert torch.equal(layer.weight, own.weight)
    assert layer.weight.quant_state.quant_type == changes.get("bnb_4bit_quant_type", "nf4")
    assert layer.weight.quant_state.nested is changes.get("bnb_4bit_use_double_quant", True)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), logits(loaded))


@pytest.mark.parametrize("base_weights", ["quantized", "dequantized"])
def test_a_policy_that_was_loaded_in_4_bits(folder: str, tmp_path: Path, base_weights: Any) -> None:
    """Its config says how it is quantized, in the checkpoint's own words."""
    qlora(folder).unload().save_pretrained(tmp_path / "4bit")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    with base_checkpoint(policy, base_weights) as written:
        loaded = AutoModelForCausalLM.from_pretrained(written).train()
    assert getattr(loaded, "is_loaded_in_4bit", False) is (base_weights == "quantized")
    with policy.disable_adapter():
        assert torch.equal(logits(policy), logits(loaded))


def test_the_folder_is_gone_after_an_error(folder: str) -> None:
    with pytest.raises(KeyError), base_checkpoint(qlora(folder), "quantized") as written:
        raise KeyError
    assert not os.path.exists(written)


def test_a_full_disk_is_an_error_before_anything_is_written(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"takes 0\.0 GiB .* TMPDIR"), base_checkpoint(qlora(folder), "quantized"):
        pass


SCRIPT = """
import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator

from tests.support.qlora import qlora
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration

model, folder, base_weights = sys.argv[1:]
generation = object.__new__(AdapterVLLMGeneration)
generation.accelerator = Accelerator()
generation.model = qlora(model)
rank = generation.accelerator.process_index
with generation._shared_checkpoint(base_weights) as path:
    files = sorted(os.listdir(path))
    generation.accelerator.wait_for_everyone()
generation.accelerator.wait_for_everyone()
result = {"path": path, "files": files, "left": os.path.exists(path)}
Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_processes_of_a_machine_share_one_checkpoint(tmp_path: Path, tiny_model_dir: str) -> None:
    first, second = run_in_two_processes(SCRIPT, tmp_path, tiny_model_dir, str(tmp_path), "quantized")
    assert first == second
    assert {"config.json", "model.safetensors"} <= set(first["files"])
    assert not first["left"]


# The choice


Choose = Callable[..., str]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """The choice for a bfloat16 model on a card that this machine need not have."""
    pytest.importorskip("vllm")
    monkeypatch.setattr("vllm.plugins.load_general_plugins", lambda: None)

    def choice(
        wanted: Any,
        gib: float = 24,
        methods: tuple[str, ...] = ("bitsandbytes",),
        device: str = "cuda",
        parameters: float = 7.6e9,
        processes: int = 1,
        policy: Any = None,
    ) -> str:
        card = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
        monkeypatch.setattr("vllm.model_executor.layers.quantization.QUANTIZATION_METHODS", list(methods))
        base = SimpleNamespace(
            num_parameters=lambda: int(parameters),
            get_output_embeddings=lambda: None,
            named_modules=list,
            named_parameters=list,
        )
        policy = policy or SimpleNamespace(get_base_model=lambda: base)
        return choose_base_weights(wanted, policy, torch.device(device), 0.5, processes)

    return choice


@pytest.mark.parametrize(
    ("wanted", "changes", "expected"),
    [
        ("auto", {}, "quantized"),  # 14.2 GiB in 9 of the engine's 12
        ("auto", {"gib": 48}, "dequantized"),  # in 18 of 24
        ("auto", {"parameters": 1.5e9}, "dequantized"),  # 2.8 GiB
        ("auto", {"methods": ()}, "dequantized"),
        ("auto", {"device": "cpu"}, "dequantized"),
        ("auto", {"processes": 2}, "dequantized"),
        # What is asked for is taken.
        ("quantized", {"gib": 80}, "quantized"),
        ("quantized", {"device": "cpu"}, "quantized"),
        ("dequantized", {"gib": 8}, "dequantized"),
    ],
)
def test_the_choice_follows_from_memory_and_machine(
    choose: Choose, wanted: str, changes: dict[str, Any], expected: str
) -> None:
    assert choose(wanted, **changes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"methods": ()}, "`pip install vllm-bnb-plugin`"), ({"processes": 2}, "with tensor parallelism")],
)
def test_quantized_is_refused_where_vllm_cannot_hold_the_policys_weights(
    choose: Choose, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        choose("quantized", **changes)
    assert "Set `vllm_base_weights='dequantized'`, which needs 14.2 GiB" in str(error.value)


def test_4_bits_of_a_policy_that_vllm_can_hold(choose: Choose, folder: str) -> None:
    assert choose("quantized", policy=qlora(folder)) == "quantized"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # vLLM joins q, k and v in one layer, in one precision.
        (
            {"llm_int8_skip_modules": ["k_proj", "lm_head"]},
            r"has model\.layers\.0\.self_attn\.k_proj in full precision",
        ),
        ({"llm_int8_skip_modules": ["none"]}, "output head is in 4 bits"),
        (FLOAT_STORAGE, r"stored as uint8, and the policy's as torch\.bfloat16 \(model\.layers"),
    ],
)
def test_4_bits_of_a_policy_that_vllm_cannot_hold(
    choose: Choose, tiny_model_dir: str, changes: dict[str, Any], message: str
) -> None:
    policy = qlora(tiny_model_dir, **changes)
    assert choose("auto", policy=policy) == "dequantized"
    with pytest.raises(ValueError, match=message):
        choose("quantized", policy=policy)


def test_experts_that_the_policy_keeps_in_full_precision(choose: Choose, tiny_model_dir: str) -> None:
    policy = qlora(tiny_model_dir)
    layer = policy.get_base_model().model.layers[1].mlp
    layer.register_parameter("experts", torch.nn.Parameter(torch.zeros(2, 4, 4), requires_grad=False))
    assert choose("auto", policy=policy) == "dequantized"
