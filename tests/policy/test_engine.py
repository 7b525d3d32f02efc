"""What happens around a generation with vLLM: sleep mode, and ranks that share an engine. Without an engine."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration
from treepo_trl.policy.engine import VLLMPolicy, awake, gather_prompts, same_draws
from treepo_trl.trl.host import Host


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


@pytest.mark.parametrize("is_synchronized", [False, True])
def test_a_sleeping_engine_gets_its_weights_once_and_sleeps_again_even_after_an_error(is_synchronized: bool) -> None:
    generation: Any = Generation(enable_sleep_mode=True)
    if is_synchronized:
        generation.sync_weights()

    def drive() -> None:
        with awake(generation):
            assert generation.calls == ["sync", ("wake", ["kv_cache"])]
            assert not generation._llm_weights_sleeping
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive()
    assert generation.calls[2:] == [("sleep", 2)]
    assert generation._llm_weights_sleeping


def test_without_sleep_mode_nothing_is_done() -> None:
    generation: Any = Generation(enable_sleep_mode=False)
    with awake(generation):
        pass
    assert generation.calls == []


def seed_all(seed: int) -> None:
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(seed)


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(1))]


def test_ranks_that_share_an_engine_draw_alike_and_get_their_own_numbers_back() -> None:
    generation: Any = Generation(enable_sleep_mode=False, tensor_parallel_size=2)
    inside, after, alone = [], [], []
    for rank in (0, 1):
        seed_all(100 + rank)
        alone.append(draws())
        seed_all(100 + rank)
        with same_draws(generation, "7/3"):
            inside.append(draws())
        after.append(draws())
    assert inside[0] == inside[1]
    assert after == alone
    assert after[0] != after[1]
    with same_draws(generation, "7/4"):
        assert draws() != inside[0]


def test_an_engine_of_its_own_leaves_numbers_and_prompts_alone() -> None:
    generation: Any = Generation(enable_sleep_mode=False)
    seed_all(5)
    expected = draws()
    seed_all(5)
    with same_draws(generation, "7/3"):
        assert draws() == expected
    assert gather_prompts(generation, [[1], [2, 3]]) == ([[1], [2, 3]], slice(0, 2))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_that_share_an_engine_ask_for_all_prompts_and_keep_their_own(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    parts = [[[1], [2]], [[3]], [[4], [5], [6]]]
    generation: Any = Generation(enable_sleep_mode=False, tensor_parallel_size=3)
    generation.tp_group = "group"

    def all_gather_object(gathered: list[Any], prompts: Any, group: str) -> None:
        assert (prompts, group) == (parts[rank], "group")
        gathered[:] = parts

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    prompts, own = gather_prompts(generation, parts[rank])
    assert prompts == [[1], [2], [3], [4], [5], [6]]
    assert prompts[own] == parts[rank]


# vLLM's engine


def vllm_policy(generation: Any) -> Any:
    """A connected `VLLMPolicy` of a trainer at step 0."""
    policy: Any = VLLMPolicy(SimpleNamespace(vllm_tensor_parallel_size=1), loads_adapter=True)  # pyright: ignore
    policy._watch = SimpleNamespace(is_on=False)
    policy._generation, policy.engine = generation, SimpleNamespace(lora_request=None)
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(report_to=[]),
        accelerator=SimpleNamespace(is_main_process=True, distributed_type="NO"),
        _last_loaded_step=-1,
    )
    policy._host = Host(trainer)
    return policy


def test_the_engine_gets_the_weights_of_each_step_once() -> None:
    generation: Any = Generation(enable_sleep_mode=False)
    policy = vllm_policy(generation)
    for step, num_synchronized in ((0, 1), (0, 1), (1, 2), (1, 2), (5, 3)):
        policy._host.trainer.state.global_step = step
        with policy.ready("7/0", [[1]]):
            assert generation.calls == ["sync"] * num_synchronized


def test_the_engine_samples_with_the_adapter_that_was_loaded_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterVLLMGeneration, "__init__", Generation.__init__)
    generation: Any = AdapterVLLMGeneration(enable_sleep_mode=False)
    policy = vllm_policy(generation)
    generation.sync_weights = lambda: setattr(generation.llm, "lora_request", policy._host.trainer.state.global_step)
    for step in (0, 1):
        policy._host.trainer.state.global_step = step
        with policy.ready("7/0", [[1]]):
            assert policy.engine.lora_request == step


def test_each_training_is_probed_once_whoever_has_loaded_the_adapter_before() -> None:
    """Evaluation at the start loads it, and a user may sample on one process alone: probing is for all together."""
    generation: Any = Generation(enable_sleep_mode=False)
    policy = vllm_policy(generation)
    policy._watch.is_on = True
    policy._probe = lambda prompts: generation.calls.append(("probe", prompts))

    def calls(in_batch: bool) -> list[Any]:
        generation.calls.clear()
        with policy.ready("7/0", [[1]], in_batch):
            return list(generation.calls)

    assert calls(in_batch=False) == ["sync"]
    policy._host.trainer._last_loaded_step = 0  # as evaluation leaves it
    assert calls(in_batch=True) == [("probe", [[1]])]
    assert calls(in_batch=True) == []
    policy.training_starts()
    assert calls(in_batch=True) == [("probe", [[1]])]
    policy.training_starts()
    policy._watch.is_on = False
    assert calls(in_batch=True) == []
