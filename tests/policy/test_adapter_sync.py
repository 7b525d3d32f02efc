"""What happens around a generation with vLLM: sleep mode, and ranks that share an engine. Without an engine."""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from trl.generation.vllm_generation import VLLMGeneration

from treepo_trl.policy import adapter_sync as weight_sync
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration, awake, gather_prompts, same_draws


class Generation:
    """Records what TRL's `VLLMGeneration` would be asked to do."""

    def __init__(self, enable_sleep_mode: bool, tensor_parallel_size: int = 1) -> None:
        self.calls: list[Any] = []
        self.enable_sleep_mode = enable_sleep_mode
        self.tensor_parallel_size = tensor_parallel_size
        self.model = object()
        self._llm_weights_sleeping = enable_sleep_mode
        self.llm = SimpleNamespace(
            wake_up=lambda tags: self.calls.append(("wake", tags)),
            sleep=lambda level: self.calls.append(("sleep", level)),
        )

    def sync_weights(self) -> None:
        self.calls.append("sync")
        self._llm_weights_sleeping = False


def test_a_sleeping_engine_gets_its_weights_first_and_sleeps_again() -> None:
    generation: Any = Generation(enable_sleep_mode=True)
    with awake(generation):
        assert generation.calls == ["sync", ("wake", ["kv_cache"])]
        assert not generation._llm_weights_sleeping
    assert generation.calls[2:] == [("sleep", 2)]
    assert generation._llm_weights_sleeping


def test_weights_that_were_just_synchronized_are_not_sent_twice() -> None:
    generation: Any = Generation(enable_sleep_mode=True)
    generation.sync_weights()
    with awake(generation):
        pass
    assert generation.calls == ["sync", ("wake", ["kv_cache"]), ("sleep", 2)]


def test_an_engine_sleeps_after_an_error_too() -> None:
    generation: Any = Generation(enable_sleep_mode=True)
    with pytest.raises(KeyboardInterrupt), awake(generation):
        raise KeyboardInterrupt
    assert generation.calls[-1] == ("sleep", 2)


def test_without_sleep_mode_nothing_is_done() -> None:
    generation: Any = Generation(enable_sleep_mode=False)
    with awake(generation):
        pass
    assert generation.calls == []


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(1))]


def test_ranks_that_share_an_engine_draw_alike_and_get_their_own_numbers_back() -> None:
    generation: Any = Generation(enable_sleep_mode=False, tensor_parallel_size=2)
    inside, after, alone = [], [], []
    for rank in (0, 1):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(100 + rank)
        expected = draws()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(100 + rank)
        with same_draws(generation, "7/3"):
            inside.append(draws())
        after.append(draws())
        alone.append(expected)
    assert inside[0] == inside[1]
    assert after == alone
    assert after[0] != after[1]
    with same_draws(generation, "7/4"):
        assert draws() != inside[0]


def test_an_engine_of_its_own_leaves_numbers_and_prompts_alone() -> None:
    generation: Any = Generation(enable_sleep_mode=False)
    torch.manual_seed(5)
    expected = draws()[2]
    torch.manual_seed(5)
    with same_draws(generation, "7/3"):
        assert draws()[2] == expected
    assert gather_prompts(generation, [[1], [2, 3]]) == ([[1], [2, 3]], slice(0, 2))


def parts_of_a_generation(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """An `AdapterVLLMGeneration` without an engine; `calls` has what it was asked to do."""
    monkeypatch.setattr(VLLMGeneration, "__init__", lambda self: None)
    generation: Any = AdapterVLLMGeneration(**options)
    generation.calls = []
    generation.tensor_parallel_size = 1
    generation.accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO)
    generation.model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(hf_device_map={"": 0}))
    return generation


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_adapter_is_tried_at_construction_and_the_engine_sleeps_as_before(
    monkeypatch: pytest.MonkeyPatch, sleeps: bool
) -> None:
    """Its weights are read while it is awake: those of a sleeping engine are not in memory."""
    generation = parts_of_a_generation(monkeypatch)
    calls = generation.calls
    generation.enable_sleep_mode = sleeps
    generation._llm_weights_sleeping = sleeps
    generation.llm = SimpleNamespace(sleep=lambda level: calls.append(("sleep", level)))

    def sync_weights() -> None:
        calls.append("sync")
        generation._llm_weights_sleeping = False

    generation.sync_weights = sync_weights
    generation._compare_base_weights = lambda: calls.append("compare")
    generation._try_adapter()
    assert calls == ["sync", "compare"] + ([("sleep", 2)] if sleeps else [])
    assert generation._llm_weights_sleeping is sleeps


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (False, ["engine, asleep", "try"]),
        (True, ["parked", "cache emptied", "engine, asleep", "share", "report", "back", "try"]),
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
    generation.model.peft_config = {"default": SimpleNamespace(r=4)}
    base = SimpleNamespace(config=SimpleNamespace(_commit_hash=None), is_loaded_in_4bit=False)
    generation.model.get_base_model = lambda: base
    generation.enable_sleep_mode = True
    monkeypatch.setattr(weight_sync, "engine_lora_rank", lambda rank: 8)
    monkeypatch.setattr(weight_sync, "_lora_llm_class", lambda options: None)
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: calls.append("engine, asleep"))
    monkeypatch.setattr(weight_sync, "different_weights", lambda *_: calls.append("weights read"))
    monkeypatch.setattr(weight_sync, "empty_cache", lambda: calls.append("cache emptied"))

    @contextmanager
    def parked(of: Any) -> Iterator[None]:
        assert of is base
        calls.append("parked")
        yield
        calls.append("back")

    monkeypatch.setattr(weight_sync, "parked", parked)
    generation._share_base_weights = lambda: calls.append("share") or (1, {})
    generation._report_sharing = lambda *_: calls.append("report")
    generation._try_adapter = lambda: calls.append("try")
    generation._init_vllm()
    assert calls == expected


# An engine that sleeps without its cache alone


@pytest.mark.parametrize(
    ("device", "sleeps", "keeps", "shares", "other_worker"),
    [
        ("cuda", True, True, False, True),
        ("cuda", True, False, True, True),  # the policy computes with these weights
        ("cuda", True, False, False, False),
        ("cuda", False, False, True, False),
        ("cpu", True, True, True, False),
    ],
)
def test_whose_weights_stay(
    monkeypatch: pytest.MonkeyPatch, device: str, sleeps: bool, keeps: bool, shares: bool, other_worker: bool
) -> None:
    generation = parts_of_a_generation(monkeypatch, share_base_weights=shares, sleep_keeps_weights=keeps)
    generation.enable_sleep_mode = sleeps
    generation.accelerator.device = torch.device(device)
    expected = {"worker_cls": "treepo_trl.policy.keep_weights_worker.KeepWeightsWorker"} if other_worker else {}
    assert generation._worker_options() == expected


def test_weights_lie_outside_the_memory_that_sleep_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_worker = pytest.importorskip("vllm.v1.worker.gpu_worker")
    from treepo_trl.policy.keep_weights_worker import KeepWeightsWorker

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


def test_other_devices_have_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = parts_of_a_generation(monkeypatch, share_base_weights=True)
    generation.enable_sleep_mode = True
    generation.accelerator.device = torch.device("xpu")
    with pytest.raises(ValueError, match=r"are for CUDA, this is 'xpu'\. Unset `vllm_enable_sleep_mode`"):
        generation._worker_options()


# One copy of the base


@pytest.mark.parametrize("sharding", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_policy_in_parts_shares_nothing(monkeypatch: pytest.MonkeyPatch, sharding: DistributedType) -> None:
    generation = parts_of_a_generation(monkeypatch, share_base_weights=True)
    generation.accelerator.distributed_type = sharding
    with pytest.raises(ValueError, match=f"{sharding.value} splits the policy's weights"):
        generation._init_vllm()


def test_a_policy_on_several_cards_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = parts_of_a_generation(monkeypatch, share_base_weights=True)
    device_map: dict[str, Any] = {"model.layers.0": 0, "model.layers.1": 1}
    generation.model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(hf_device_map=device_map))
    with pytest.raises(ValueError, match=r"spread over 0, 1 and .*`CUDA_VISIBLE_DEVICES=0`"):
        generation._init_vllm()
    device_map["lm_head"] = "cpu"
    with pytest.raises(ValueError, match=r"spread over 0, 1, cpu and .*`load_in_4bit`"):
        generation._init_vllm()


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
    monkeypatch.setattr(weight_sync, "different_weights", lambda *_: generation.calls.append("compare") or [])
    generation._compare_base_weights()
    assert generation.calls == (["compare"] if compares else [])


def test_what_is_held_twice_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    PartialState()  # accelerate's logger wants it
    generation = parts_of_a_generation(monkeypatch, share_base_weights=True)
    generation.model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(dtype=torch.bfloat16))
    generation.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float16)),
    )
    generation._report_sharing(900 * 2**20, {"norm": 100 * 2**20})
    assert caplog.text == ""
    own = {"norm": 2**10, "experts": 3 * 2**30, "embed": 2**30, "head": 2**29}
    generation._report_sharing(2**30, own)
    assert "share 1.00 GiB of the base. 4.50 GiB are held twice, experts, embed, head for example" in caplog.text
    assert "(policy bfloat16, engine float16)" in caplog.text
    with pytest.raises(ValueError, match=r"`--dtype float16`"):
        generation._report_sharing(0, own)
