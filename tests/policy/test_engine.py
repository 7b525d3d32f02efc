"""What happens around a generation with vLLM: sleep mode, and ranks that share an engine. Without an engine."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from treepo_trl.policy.engine import awake, gather_prompts, same_draws


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
