"""
The adapter that reaches an engine where processes share the policy's weights.

DeepSpeed starts only on accelerators, so ZeRO-3 is imitated: weights that are empty but where they are gathered.
tests/trainer/test_distributed.py has FSDP2.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.support.models import make_model
from treepo_trl.policy.gathered_adapter import (
    check_own_forward,
    check_whole_adapter,
    gathered_adapter,
    num_bytes,
    write_adapter,
)


TARGETS = ["embed_tokens", "q_proj"]
NUM_NUMBERS = 2 * (65 + 64) + 2 * 2 * (64 + 64)  # rank 2: of the embedding, and of a layer in each of two blocks


def lora_model() -> Any:
    model: Any = make_model()
    return get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))


def accelerator_with(zero_stage: int = 0, fsdp_version: int | None = None, num_processes: int = 2) -> Any:
    zero = SimpleNamespace(zero_stage=zero_stage) if zero_stage else None
    fsdp = SimpleNamespace(fsdp_version=fsdp_version) if fsdp_version else None
    state = SimpleNamespace(deepspeed_plugin=zero, fsdp_plugin=fsdp)
    return SimpleNamespace(state=state, device=torch.device("cpu"), num_processes=num_processes)


def partitioned(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Empty a model's parameters as ZeRO-3 does; the names of those that are gathered."""
    whole = {name: parameter.data for name, parameter in model.named_parameters()}
    names, asked = {id(parameter): name for name, parameter in model.named_parameters()}, list[str]()

    @contextmanager
    def gathered(parameters: list[Any]) -> Iterator[None]:
        for parameter in parameters:
            asked.append(names[id(parameter)])
            parameter.data = whole[asked[-1]].clone()
        yield
        for parameter in parameters:
            parameter.data.zero_()  # the memory is another's now
            parameter.data = torch.empty(0)

    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()  # pyright: ignore[reportAttributeAccessIssue]
        parameter.data = torch.empty(0)
    return asked


def test_an_adapter_in_parts_of_zero_3_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    asked = partitioned(model, monkeypatch)
    assert num_bytes(model) == 4 * NUM_NUMBERS
    folder = write_adapter(model, gathered_adapter(model, accelerator_with(zero_stage=3)), str(tmp_path))
    assert sorted(asked) == sorted(expected)  # the base, which is large, stays in parts
    saved = load_file(f"{folder}/adapter_model.safetensors")
    assert len(saved) == len(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name.replace(".default", "")], weight, rtol=0, atol=0)


def test_weights_have_the_names_that_they_have_without_wrappers() -> None:
    model = lora_model()
    before = gathered_adapter(model, accelerator_with())
    layers: Any = model.get_base_model().model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    after = gathered_adapter(model, accelerator_with())
    assert before.keys() == after.keys()
    assert sum(weight.numel() for weight in after.values()) == NUM_NUMBERS == num_bytes(model) // 4


def test_an_adapter_below_the_first_fsdp_is_refused() -> None:
    for served in ({}, {"fsdp_version": 2}, {"zero_stage": 2}, {"zero_stage": 3}):
        check_whole_adapter(accelerator_with(**served))
    with pytest.raises(ValueError, match=r"Set `fsdp_version: 2` .*fsdp2\.yaml.*`vllm_lora_sync='merge'`"):
        check_whole_adapter(accelerator_with(fsdp_version=1))


def test_a_policy_whose_forwards_are_collective_does_not_sample_itself() -> None:
    """Trees of the processes need different numbers of forwards: they would wait for each other."""
    for served in ({}, {"zero_stage": 2}, {"fsdp_version": 2, "num_processes": 1}):
        check_own_forward(accelerator_with(**served), gathers_zero_3=False)
    check_own_forward(accelerator_with(zero_stage=3), gathers_zero_3=True)
    for version in (1, 2):
        with pytest.raises(ValueError, match=r"cannot sample below FSDP.*Set `use_vllm=True`, or train without FSDP"):
            check_own_forward(accelerator_with(fsdp_version=version), gathers_zero_3=True)
    with pytest.raises(ValueError, match=r"below ZeRO-3.*`use_vllm=True`, or `ds3_gather_for_generation=True`"):
        check_own_forward(accelerator_with(zero_stage=3), gathers_zero_3=False)
