"""Dynamic sampling: what counts as a signal, the rounds."""

import math
import threading
from typing import Any

import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.trainers import labelled
from treepo_trl import SegmentTree
from treepo_trl.batch.fill import Candidate, fill_batch, without_signal
from treepo_trl.batch.prompt_stream import PromptStream


nan = math.nan


# Signal

ONE = torch.ones(1)
TWO = torch.tensor([1.0, 0.5])


@pytest.mark.parametrize(
    ("rewards", "weights", "aggregation", "expected"),
    [
        ([[[1], [1], [1]], [[0], [0], [1]]], ONE, "sum_then_normalize", [True, False]),
        ([[[1], [nan], [1]], [[nan], [0], [1]]], ONE, "sum_then_normalize", [True, False]),
        ([[[nan], [nan], [nan]], [[nan], [nan], [7]]], ONE, "sum_then_normalize", [True, True]),
        # 1 x 1 + 0.5 x 0 = 1 x 0 + 0.5 x 2: different rewards with the same sum.
        ([[[1, 0], [0, 2]], [[1, 0], [0, 1]]], TWO, "sum_then_normalize", [True, False]),
        # The sum has no signal, each function by itself has: +1 and -1, weighted 1 and 0.5.
        ([[[1, 0], [0, 2]], [[5, 5], [5, 5]]], TWO, "normalize_then_sum", [False, True]),
        # 0.1 has no exact mean: normalizing it leaves rounding errors, which are not equal.
        ([[[0.1, nan]] * 7 + [[nan, 0.7]]], TWO, "normalize_then_sum", [True]),
        ([[[0.1, nan]] * 7 + [[nan, 0.7]]], TWO, "sum_then_normalize", [False]),
        # A function of weight 0 is only logged.
        ([[[0, 1], [0, 2]]], torch.tensor([1.0, 0.0]), "sum_then_normalize", [True]),
    ],
)
def test_without_signal(rewards: list, weights: torch.Tensor, aggregation: str, expected: list[bool]) -> None:
    table = torch.tensor(rewards, dtype=torch.float32)
    is_without, sums = without_signal(table, weights, aggregation)
    assert is_without.tolist() == expected
    by_hand = (torch.nan_to_num(table) * weights).sum(-1).masked_fill(table.isnan().all(-1), nan)
    torch.testing.assert_close(sums, by_hand, equal_nan=True)


# Rounds


def run_fill(
    num_processes: int, num_local: int, rounds: int, good: set[int], size: int = 40
) -> tuple[list[Any], list[list[tuple[int, list[str]]]]]:
    """
    `fill_batch` on threads that gather from each other. A prompt of `good` has rewards 0 and 1, others 0 and 0.

    Returns each process's batch, and the candidates of its rounds that had no tree.
    """
    barrier = threading.Barrier(num_processes, timeout=120)
    shared: dict[int, list[list[float]]] = {}
    sampled: list[list[tuple[int, list[str]]]] = [[] for _ in range(num_processes)]
    batches: list[Any] = [None] * num_processes

    def process(rank: int) -> None:
        def score(candidates: list[Candidate], number: int) -> torch.Tensor:
            missing = [c for c in candidates if c.tree is None]
            sampled[rank].append((number, [c.example["prompt"] for c in missing]))
            for candidate in missing:
                candidate.tree = SegmentTree([int(candidate.example["prompt"][1:])])
                candidate.tree.add(None, [5, 6], None, "stop")
            # What is scored once more counts as it did the first time.
            shared[rank] = [
                [0.0, float(int(c.example["prompt"][1:]) in good)] if c in missing else [nan, nan] for c in candidates
            ]
            barrier.wait()
            rewards = torch.tensor([shared[other] for other in range(num_processes)])[..., None]
            barrier.wait()
            return rewards

        stream = PromptStream(labelled("v" * size), shuffle=False, seed=0)
        batches[rank] = fill_batch(
            stream,
            num_local,
            rounds,
            score,
            lambda rewards: without_signal(rewards, ONE, "sum_then_normalize"),
            rank,
            num_processes,
        )
        assert stream.position == (0, num_local * num_processes + batches[rank].num_replaced)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return batches, sampled


def prompts_in(batch: Any) -> list[str]:
    return [candidate.example["prompt"] for candidate in batch.candidates]


def test_rounds_by_hand() -> None:
    """Of w0..w3 only w1 is good; w4 w5 w6 take the other places, w5 of them is good; then w7 and w8, both good."""
    (batch,), (sampled,) = run_fill(1, 4, rounds=3, good={1, 5, 7, 8})
    assert sampled == [(0, ["w0", "w1", "w2", "w3"]), (1, ["w4", "w5", "w6"]), (2, ["w7", "w8"])]
    assert prompts_in(batch) == ["w7", "w1", "w5", "w8"]
    assert batch.rewards.tolist() == [[0.0], [1.0]] * 4
    assert (batch.num_rounds, batch.num_replaced, batch.frac_without_signal) == (2, 5, 0.0)
    assert batch.metrics()["dynamic_sampling/reward"] == pytest.approx(4 / 18)  # nine prompts were scored, twice each


def test_a_batch_that_finds_no_signal_says_what_goes_on_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Of four prompts w1 is good; the other three are replaced in each round."""
    PartialState()  # accelerate's logger wants it
    run_fill(1, 4, rounds=25, good={1}, size=100)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    for message, used in zip(messages, (10, 20), strict=True):
        assert f"replaced prompts {used} times for one batch, and 3 of 4 have no signal" in message
        assert f"sampled {4 + 3 * used} prompts and, on this process, {2 * (4 + 3 * used)} tokens" in message
        assert "after 25 rounds (`dynamic_sampling_rounds`)" in message


@settings(deadline=None)  # threads wait for each other
@given(
    num_processes=st.integers(1, 3),
    num_local=st.integers(1, 3),
    rounds=st.integers(0, 3),
    good=st.sets(st.integers(0, 39)),
)
def test_laws_of_the_rounds(num_processes: int, num_local: int, rounds: int, good: set[int]) -> None:
    batches, sampled = run_fill(num_processes, num_local, rounds, good)
    # All processes agree on what is global.
    for batch in batches:
        assert torch.equal(batch.rewards, batches[0].rewards)
        assert (batch.num_rounds, batch.num_replaced) == (batches[0].num_rounds, batches[0].num_replaced)
        # Everything that was drawn, with its own rewards: pass rates are learned from it.
        assert [example["prompt"] for example in batch.drawn] == [f"w{i}" for i in range(len(batch.drawn))]
        assert batch.drawn_rewards.tolist() == [[0.0, float(i in good)] for i in range(len(batch.drawn))]
    # The batch is full, its trees are those of its prompts, and its rewards are in their places.
    kept = [prompt for batch in batches for prompt in prompts_in(batch)]
    assert len(kept) == num_processes * num_local
    numbers = [int(prompt[1:]) for prompt in kept]
    trees = [candidate.tree.prompt_ids for batch in batches for candidate in batch.candidates]
    assert trees == [[number] for number in numbers]
    assert batches[0].rewards.flatten().tolist() == [r for n in numbers for r in (0.0, float(n in good))]
    # Each prompt is sampled once, by one process, and no prompt of the stream is passed over.
    drawn = [prompt for calls in sampled for _, prompts in calls for prompt in prompts]
    assert sorted(drawn, key=lambda p: int(p[1:])) == [f"w{i}" for i in range(len(drawn))]
    # What has no signal is in the batch only if the rounds are used up; what has one is always kept.
    assert {f"w{i}" for i in good} & set(drawn) <= set(kept)
    if not set(numbers) <= good:
        assert batches[0].num_rounds == rounds
    assert batches[0].frac_without_signal == pytest.approx(sum(n not in good for n in numbers) / len(numbers))
    # Every process calls as often.
    assert len({len(calls) for calls in sampled}) == 1
