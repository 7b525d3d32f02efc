"""What a synchronization asks of the engine and when, and what the engine makes of TRL's calls. Without an engine."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.generation.vllm_generation import VLLMGeneration

from treepo_trl.policy import adapter_sync
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration


def generation_with(monkeypatch: pytest.MonkeyPatch, adapter: str, shares: bool, sleeps: bool) -> Any:
    """An `AdapterVLLMGeneration` whose `calls` are what it asked for; `resets` says whether its cache does."""
    monkeypatch.setattr(VLLMGeneration, "__init__", lambda self: None)
    requests = SimpleNamespace(LoRARequest=lambda *values, load_inplace=False: (*values, load_inplace))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", requests)
    monkeypatch.setattr(adapter_sync, "empty_cache", lambda: None)
    generation: Any = AdapterVLLMGeneration(share_base_weights=shares)
    calls: list[Any] = []

    def save(folder: str, selected_adapters: list[str], state_dict: dict[str, Any], **_: Any) -> None:
        calls.append(("saved", folder, selected_adapters, list(state_dict)))

    generation.calls, generation.resets = calls, True
    generation.enable_sleep_mode = generation._llm_weights_sleeping = sleeps
    generation._adapter_folder = SimpleNamespace(path="folder")
    generation.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
    generation._share_base_weights = lambda: calls.append("base shared")
    names = [f"layer.lora_A.{name}.weight" for name in ("default", "other")] + ["layer.base_layer.weight"]
    generation.model = SimpleNamespace(
        active_adapter=adapter,
        named_parameters=lambda: [(name, torch.nn.Parameter(torch.zeros(1))) for name in names],
        save_pretrained=save,
    )
    generation.llm = SimpleNamespace(
        wake_up=lambda tags: calls.append(("awake", tags)),
        llm_engine=SimpleNamespace(add_lora=lambda request: calls.append(("loaded", request))),
        reset_prefix_cache=lambda: calls.append("cache reset") or generation.resets,
    )
    return generation


@pytest.mark.parametrize(
    ("adapter", "folder", "shares", "sleeps"),
    [("default", "folder", False, False), ("default", "folder", True, True), ("other", "folder/other", False, True)],
)
def test_an_engine_has_the_adapter_and_nothing_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, adapter: str, folder: str, shares: bool, sleeps: bool
) -> None:
    generation = generation_with(monkeypatch, adapter, shares, sleeps)
    generation.sync_weights()
    assert generation.calls == [
        *(["base shared"] if shares else []),  # preparing the policy for training may have copied it
        ("saved", "folder", [adapter], [f"layer.lora_A.{adapter}.weight"]),
        *([("awake", ["weights"])] if sleeps else []),
        ("loaded", ("policy", 1, folder, True)),  # in the place of the one with this number
        "cache reset",
    ]
    assert generation.llm.lora_request == ("policy", 1, folder, False)
    assert not generation._llm_weights_sleeping


def test_an_engine_that_keeps_its_cache_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = generation_with(monkeypatch, "default", shares=False, sleeps=False)
    generation.resets = False
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        generation.sync_weights()


def test_trls_calls_reach_an_engine_with_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL builds it with options of its own, lets it sleep at level 2, and generates without an adapter."""
    vllm = pytest.importorskip("vllm")
    from treepo_trl.policy.vllm_classes import LoraLLM

    calls: list[Any] = []
    for name in ("__init__", "sleep", "generate"):
        monkeypatch.setattr(vllm.LLM, name, lambda self, *args, name=name, **kwargs: calls.append((name, kwargs)))
    monkeypatch.setattr(LoraLLM, "engine_options", {"revision": "abc", "enable_lora": True})
    llm = LoraLLM(model="tiny", revision=None)
    llm.lora_request = "policy"  # pyright: ignore[reportAttributeAccessIssue]
    llm.generate([])
    llm.generate([], lora_request="another")
    for level in (0, 1, 2):
        llm.sleep(level=level)
    assert calls == [
        ("__init__", {"model": "tiny", "revision": "abc", "enable_lora": True}),
        ("generate", {"lora_request": "policy"}),
        ("generate", {"lora_request": "another"}),
        *(("sleep", {"level": level}) for level in (0, 1, 1)),  # level 2 drops the weights
    ]
