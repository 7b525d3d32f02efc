"""What is logged, by hand on small trees."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from treepo_trl.metrics import add_totals, reduce_totals, tree_metrics, tree_totals
from treepo_trl.sampling.sampler import SamplingStats
from treepo_trl.sampling.tree import SegmentTree


def hand_trees() -> list[SegmentTree]:
    """
    Two trees:

        [1, 2] ── [3] stop                    [5, 6] repetition
               ├─ [4, 4, 4] ── [5] length
               │            └─ [6] stop
               └─ [9] pattern
        [7] stop
    """
    first = SegmentTree([0])
    first.add(None, [1, 2])
    first.add(None, [7], None, "stop")
    first.add(0, [3], None, "stop")
    first.add(0, [4, 4, 4])
    first.add(0, [9], None, "pattern")
    first.add(3, [5], None, "length")
    first.add(3, [6], None, "stop")
    second = SegmentTree([0])
    second.add(None, [5, 6], None, "repetition")
    return [first, second]


STATS = SamplingStats(
    num_decoded_tokens=20,
    num_segments=8,
    num_fallback_leaves=2,
    seconds=3.0,
    engine_seconds=2.5,
    num_serial_segments=4,
)


def test_metrics_by_hand() -> None:
    assert tree_metrics(tree_totals(hand_trees(), STATS)) == pytest.approx(
        {
            "tree/depth_mean": (1 + 2 + 2 + 3 + 3 + 1) / 6,
            # Weights: 1/2 for [7], 1/6 for each end below [1, 2] and 1/12 for those below [4, 4, 4].
            "tree/mean_length": ((1 / 2 + 3 / 6 + 3 / 6 + 6 / 12 + 6 / 12) + 2) / 2,
            "tree/finish_stop_frac": 3 / 6,
            "tree/finish_pattern_frac": 1 / 6,
            "tree/finish_repetition_frac": 1 / 6,
            "tree/finish_length_frac": 1 / 6,
            "tree/fallback_frac": 2 / 6,
            "tree/leaves_mean": 6 / 2,
            "tree/single_leaf_frac": 1 / 2,
            "tree/serial_segments": 4,
            "tree/longest_path": 3,
            "tree/decoded_tokens": 20,
            "tree/unique_tokens": (2 + 1 + 1 + 3 + 1 + 1 + 1) + 2,
            "tree/leaf_tokens": (1 + 3 + 3 + 6 + 6) + 2,
            "tree/leaf_unique_ratio": 21 / 12,
            "tree/subgroup_size_mean": (4 + 2) / 2,  # the nodes [1, 2] and [4, 4, 4]
            "tree/sampler_seconds": 0.5,
            "tree/engine_seconds": 2.5,
        }
    )


def test_independent_completions_have_no_subgroups() -> None:
    _, single = hand_trees()
    metrics = tree_metrics(tree_totals([single], SamplingStats()))
    assert metrics["tree/subgroup_size_mean"] == 0
    assert metrics["tree/leaf_unique_ratio"] == 1


def processes(count: int) -> Any:
    """An accelerator whose processes all hold the same."""
    return SimpleNamespace(device=torch.device("cpu"), gather=lambda row: torch.cat([row] * count))


def test_metrics_of_two_equal_processes_are_means_and_sums() -> None:
    totals = tree_totals(hand_trees(), STATS)
    both = reduce_totals(totals, processes(2))
    assert both == {name: 2 * value for name, value in totals.items()}
    one, two = tree_metrics(totals), tree_metrics(both)
    for name, value in two.items():
        doubled = name in ("tree/decoded_tokens", "tree/unique_tokens", "tree/leaf_tokens")
        assert value == pytest.approx(one[name] * (2 if doubled else 1)), name


def test_ranks_that_share_an_engine_count_what_it_did_once() -> None:
    both = reduce_totals(tree_totals(hand_trees(), STATS, processes_per_engine=2), processes(2))
    assert (both["fallback_leaves"], both["decoded_tokens"]) == (2, 20)
    assert (both["leaves"], both["unique_tokens"]) == (2 * 6, 2 * 12)  # of trees of their own


def test_several_samplings_of_a_process_are_one_process() -> None:
    totals = tree_totals(hand_trees(), STATS)
    assert add_totals([totals] * 3) == {name: 3 * value for name, value in totals.items()} | {"processes": 1}


def test_large_token_counts_are_summed_to_six_digits() -> None:
    # 512 prompts x 16 leaves x 4096 tokens are 33.5 million: more than the 2 ** 24 that float32 counts exactly.
    totals = {"leaf_tokens": 33_554_433, "leaves": 8192}
    assert reduce_totals(totals, processes(1)) == pytest.approx(totals, rel=1e-6)
