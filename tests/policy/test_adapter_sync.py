"""Which adapters vLLM serves, and what a LoRA engine is given and when. Without an engine."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import IA3Config, LoHaConfig, LoraConfig
from trl.generation.vllm_generation import VLLMGeneration

from treepo_trl.policy import adapter_sync, temporary_folder
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration, check_adapter, lora_engine_options


# Which adapters are served


def test_plain_lora_is_served() -> None:
    check_adapter(LoraConfig(r=8, target_modules="all-linear"))
    check_adapter(LoraConfig(r=8, target_modules=["q_proj"], use_rslora=True, modules_to_save=[], lora_dropout=0.1))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        # These change the base weights or add a bias: the engine would sample from another policy.
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
    ids=str,
)
def test_lora_that_vllm_does_not_serve(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=r"set `vllm_lora_sync='merge'`") as error:
        check_adapter(LoraConfig(r=8, **{"target_modules": ["q_proj"], **changes}))
    assert part in str(error.value)


@pytest.mark.parametrize("config", [IA3Config(), LoHaConfig()], ids=["ia3", "loha"])
def test_other_adapters_are_not_served(config: Any) -> None:
    kind = r"(PeftType\.)?(IA3|LOHA)"
    with pytest.raises(ValueError, match=rf"vLLM serves LoRA adapters, this one is {kind}\..*'merge'"):
        check_adapter(config)


@pytest.mark.parametrize(("rank", "largest"), [(1, 1), (2, 8), (8, 8), (9, 16), (512, 512)])
def test_the_engine_has_room_for_the_adapters_rank(rank: int, largest: int) -> None:
    pytest.importorskip("vllm")
    assert lora_engine_options(rank) == {"enable_lora": True, "max_loras": 1, "max_lora_rank": largest}


def test_a_rank_above_vllms_largest_is_refused() -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ValueError, match=r"up to rank 512, this one has 513\. Lower `r`"):
        lora_engine_options(513)


# The order of construction


def parts_of_a_generation(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """An `AdapterVLLMGeneration` without an engine; `calls` has what it was asked to do."""
    monkeypatch.setattr(VLLMGeneration, "__init__", lambda self: None)
    generation: Any = AdapterVLLMGeneration(**options)
    generation.calls = []
    generation.tensor_parallel_size = 1
    generation.accelerator = SimpleNamespace(
        device=torch.device("cpu"), distributed_type=DistributedType.NO, state=SimpleNamespace(deepspeed_plugin=None)
    )
    generation.model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(hf_device_map={"": 0}))
    return generation


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_adapter_is_tried_at_construction_and_the_engine_sleeps_as_before(
    monkeypatch: pytest.MonkeyPatch, sleeps: bool
) -> None:
    """Its weights are read while it is awake: those of a sleeping engine are not in memory."""
    generation = parts_of_a_generation(monkeypatch)
    calls = generation.calls
    generation.enable_sleep_mode = generation._llm_weights_sleeping = sleeps
    generation.llm = SimpleNamespace(sleep=lambda level: calls.append(("sleep", level)))

    def sync_weights() -> None:
        calls.append("sync")
        generation._llm_weights_sleeping = False

    generation.sync_weights = sync_weights
    generation._compare_base_weights = lambda: calls.append("compare")
    generation._try_adapter()
    assert calls == ["sync", "compare"] + ([("sleep", 2)] if sleeps else [])
    assert generation._llm_weights_sleeping is sleeps


@pytest.mark.needs_vllm
@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (False, ["engine, asleep", "try"]),
        (True, ["check", "parked", "cache emptied", "engine, asleep", "share", "report", "back", "try"]),
    ],
)
def test_order_of_construction(monkeypatch: pytest.MonkeyPatch, shares: bool, expected: list[str]) -> None:
    """
    The engine is built while the policy's base is out of its way, and no weights are read when it is built.

    TRL's part ends with an engine that sleeps; shared weights are there then too.
    """
    generation = parts_of_a_generation(monkeypatch, share_base_weights=shares)
    calls = generation.calls
    generation.model.active_adapter = "default"
    generation.model.active_peft_config = SimpleNamespace(r=4)
    generation.model.named_parameters = dict[str, torch.nn.Parameter]().items
    base = SimpleNamespace(config=SimpleNamespace(_commit_hash=None), is_loaded_in_4bit=False, dtype=torch.bfloat16)
    generation.model.get_base_model = lambda: base
    generation.enable_sleep_mode = True
    generation.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float16)))
    monkeypatch.setattr(adapter_sync, "lora_engine_options", lambda rank: {"max_lora_rank": 2 * rank})
    monkeypatch.setattr(adapter_sync, "_lora_llm_class", lambda options: options)
    monkeypatch.setattr(adapter_sync, "check_sharing", lambda *_: calls.append("check"))
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: calls.append("engine, asleep"))
    monkeypatch.setattr(adapter_sync, "different_weights", lambda *_: calls.append("weights read"))
    monkeypatch.setattr(adapter_sync, "empty_cache", lambda: calls.append("cache emptied"))

    @contextmanager
    def parked(of: Any) -> Iterator[None]:
        assert of is base
        calls.append("parked")
        yield
        calls.append("back")

    def report(*arguments: Any) -> None:
        assert arguments == (1, {"norm": 2}, torch.bfloat16, torch.float16)
        calls.append("report")

    monkeypatch.setattr(adapter_sync, "parked", parked)
    monkeypatch.setattr(adapter_sync, "report_sharing", report)
    generation._share_base_weights = lambda: calls.append("share") or (1, {"norm": 2})
    generation._try_adapter = lambda: calls.append("try")
    generation._init_vllm()
    assert calls == expected


@pytest.mark.parametrize(
    ("free", "is_writable", "fits"), [(801, True, True), (800, True, False), (10**9, False, False)]
)
def test_an_adapter_travels_through_memory_where_it_fits_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, is_writable: bool, fits: bool
) -> None:
    monkeypatch.setattr(temporary_folder, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr("os.access", lambda *_: is_writable)
    monkeypatch.setattr("tempfile.tempdir", "temporary")
    place = temporary_folder.place_for(400)
    assert place == (tmp_path if fits else "temporary")


# An engine that sleeps without its cache alone


KEEPS_WEIGHTS = {"worker_cls": "treepo_trl.policy.vllm_classes.KeepWeightsWorker"}


@pytest.mark.parametrize(
    ("device", "sleeps", "keeps", "shares", "options"),
    [
        ("cuda", True, True, False, KEEPS_WEIGHTS),
        ("cuda", True, False, True, KEEPS_WEIGHTS),  # the policy computes with these weights
        ("cuda", True, False, False, {}),
        ("cuda", False, False, True, {}),
        ("cpu", True, True, True, {}),
        ("xpu", True, False, True, None),  # which has another worker
    ],
)
def test_whose_weights_stay(
    monkeypatch: pytest.MonkeyPatch, device: str, sleeps: bool, keeps: bool, shares: bool, options: Any
) -> None:
    generation = parts_of_a_generation(monkeypatch, share_base_weights=shares, sleep_keeps_weights=keeps)
    generation.enable_sleep_mode = sleeps
    generation.accelerator.device = torch.device(device)
    if options is None:
        with pytest.raises(ValueError, match=r"are for CUDA, this is 'xpu'\. Unset `vllm_enable_sleep_mode`"):
            generation._worker_options()
    else:
        assert generation._worker_options() == options


def test_weights_lie_outside_the_memory_that_sleep_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_worker = pytest.importorskip("vllm.v1.worker.gpu_worker")
    from treepo_trl.policy.vllm_classes import KeepWeightsWorker

    monkeypatch.setattr(gpu_worker.Worker, "_maybe_get_memory_pool_context", lambda self, tag: ("pool", tag))
    worker = object.__new__(KeepWeightsWorker)
    assert isinstance(worker._maybe_get_memory_pool_context("weights"), nullcontext)
    assert worker._maybe_get_memory_pool_context("kv_cache") == ("pool", "kv_cache")


def test_vllm_allocates_its_weights_as_the_worker_expects() -> None:
    gpu_worker = pytest.importorskip("vllm.v1.worker.gpu_worker")
    pools = inspect.signature(gpu_worker.Worker._maybe_get_memory_pool_context)
    assert list(pools.parameters) == ["self", "tag"]
    assert '_maybe_get_memory_pool_context(tag="weights")' in inspect.getsource(gpu_worker.Worker.load_model)
    assert '_maybe_get_memory_pool_context(tag="kv_cache")' in inspect.getsource(gpu_worker.Worker)


# One copy of the base


@pytest.mark.parametrize(
    ("processes", "sharding", "compares"),
    [(1, DistributedType.NO, True), (2, DistributedType.NO, False), (1, DistributedType.FSDP, False)],
)
def test_whole_weights_are_compared(
    monkeypatch: pytest.MonkeyPatch, processes: int, sharding: DistributedType, compares: bool
) -> None:
    generation = parts_of_a_generation(monkeypatch)
    generation.tensor_parallel_size = processes
    generation.accelerator.distributed_type = sharding
    monkeypatch.setattr(AdapterVLLMGeneration, "_engine_model", None)
    monkeypatch.setattr(adapter_sync, "different_weights", lambda *_: generation.calls.append("compare") or [])
    generation._compare_base_weights()
    assert generation.calls == (["compare"] if compares else [])
