"""Limits and errors of an engine: nothing is left behind, and the prompt is named."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import EOS, FakeEngine, endless, memoryless
from tests.support.sampling import (
    arrival,
    arrivals,
    configs,
    decode_words,
    fingerprint,
    limits,
    make_config,
    prompts_of,
    reasons,
    stop_probabilities,
)
from treepo_trl.engines import SegmentEngineError, SegmentRequest, SegmentResult
from treepo_trl.sampling.config import TreeSamplingConfig
from treepo_trl.sampling.sampler import TreeSampler
from treepo_trl.sampling.tree import SegmentTree


Draw = Callable[[list[int], random.Random], int]


class FailingEngine(FakeEngine):
    """Fails in its n-th call, once. The first calls are submit, collect, submit, and so on."""

    def __init__(self, draw: Draw, fails_at: int, error: BaseException | None = None, **options: Any) -> None:
        super().__init__(draw, **options)
        self.fails_at, self.error, self.calls = fails_at, error or RuntimeError("out of memory"), 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error

    def submit(self, requests: list[SegmentRequest]) -> None:
        super().submit(requests)
        self._count()

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        self._count()
        return super().collect(wake)

    def abort(self) -> None:
        super().abort()
        self.requests.clear()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", [3, 6])
def test_an_engine_error_aborts_what_is_running_and_is_not_hidden(error: BaseException, fails_at: int) -> None:
    engine = FailingEngine(endless, fails_at, error)
    sampler = TreeSampler(engine, make_config(8), [EOS])
    with pytest.raises(type(error)) as caught:
        sampler.sample(prompts_of(2), seed=0)
    assert caught.value is error
    assert engine.aborted == 1
    assert "While sampling prompts 0, 1 of 2" in caught.value.__notes__[-1]


@settings(deadline=None)
@given(configs(), stop_probabilities, arrivals, limits(), st.integers(1, 25))
def test_after_a_failure_anywhere_nothing_is_left_behind(
    config: TreeSamplingConfig, stop: float, arrival_seed: int | None, limits: dict[str, Any], fails_at: int
) -> None:
    engine = FailingEngine(memoryless(stop), fails_at, arrival=arrival(arrival_seed), **limits)
    sampler = TreeSampler(engine, config, [EOS])
    first, error = None, None
    try:
        first = sampler.sample(prompts_of(3), seed=0)
    except RuntimeError as caught:
        error = caught
    assert (error is not None) == (engine.calls >= fails_at)
    assert engine.aborted == (error is not None)
    assert error is None or any("While sampling prompt" in note for note in error.__notes__)
    engine.abort()
    engine.fails_at = 0
    again = sampler.sample(prompts_of(3), seed=0)
    assert [len(tree.leaves) for tree in again] == [config.num_generations] * 3
    if first is not None:
        assert fingerprint(first) == fingerprint(again)


def test_a_request_that_the_engine_refuses_names_its_prompt() -> None:
    class Engine(FakeEngine):
        def submit(self, requests: list[SegmentRequest]) -> None:
            for request in requests:
                if request.token_ids[0] == 102:
                    raise SegmentEngineError(request.request_id, "token 102 is not in the vocabulary")
            super().submit(requests)

    engine = Engine(endless)
    with pytest.raises(SegmentEngineError, match="token 102") as caught:
        TreeSampler(engine, make_config(), [EOS], decode_words).sample(prompts_of(4), seed=0)
    (note,) = caught.value.__notes__
    assert note.startswith("While sampling prompt 2 of 4 (the first is 0); prompt 2 has 3 tokens and ends in '<102>")
    assert engine.aborted == 1


def test_an_abort_that_fails_too_does_not_hide_the_first_error() -> None:
    class Engine(FailingEngine):
        def abort(self) -> None:
            raise OSError("engine is dead")

    with pytest.raises(RuntimeError, match="first") as caught:
        TreeSampler(Engine(endless, 6, RuntimeError("first")), make_config(), [EOS]).sample(prompts_of(1), seed=0)
    assert "engine is dead" in caught.value.__notes__[0]
    assert "prompt 0 of 1" in caught.value.__notes__[1]


def test_a_callback_that_fails_names_the_prompt() -> None:
    def fail(index: int, tree: SegmentTree) -> None:
        raise OSError("disk full")

    engine = FakeEngine(memoryless(1.0))
    with pytest.raises(OSError, match="disk full") as caught:
        TreeSampler(engine, make_config(), [EOS]).sample(prompts_of(12), seed=0, on_tree=fail)
    assert "While sampling prompt 0 of 12" in caught.value.__notes__[0]
    assert engine.aborted == 1


@pytest.mark.parametrize("length", [10, 11, 50])
def test_a_prompt_without_room_is_named(length: int) -> None:
    engine = FakeEngine(endless, context_length=10)
    prompts = [[1, 2], [41] * length]
    with pytest.raises(ValueError, match=f"Prompt 1 of this batch, .*<41>.* has {length} tokens .* context of 10"):
        TreeSampler(engine, make_config(), [EOS], decode_words).sample(prompts, seed=0)
    with pytest.raises(ValueError, match=f"Prompt 1 of this batch has {length} tokens"):
        TreeSampler(engine, make_config(), [EOS]).sample(prompts, seed=0)
    assert engine.requests == []


@pytest.mark.parametrize("schedule", ["early", "spread"])
def test_the_context_caps_each_prompts_completions_on_their_own(schedule: str) -> None:
    # Context 20, cap 12: room for 12 (18 left), 5 and 1.
    engine = FakeEngine(endless, context_length=20)
    config = make_config(4, max_completion_length=12, segment_length=3, branch_schedule=schedule)
    trees = TreeSampler(engine, config, [EOS]).sample([[1, 2], [3] * 15, [4] * 19], seed=0)
    for tree, length in zip(trees, [12, 5, 1], strict=True):
        assert len(tree.leaves) == 4
        assert {len(tree.completion_ids(leaf)) for leaf in tree.leaves} == {length}
        assert set(reasons(tree)) == {"length"}
    assert all(len(request.token_ids) + request.max_tokens <= 20 for request in engine.requests)
