"""Leaf weights undo the tilt of branching: means over trees of a Markov chain against its exact values."""

import statistics
from typing import Any

import pytest

from tests.support.fakes import EOS, MarkovEngine
from tests.support.sampling import make_config
from treepo_trl.sampling.sampler import TreeSampler


def markov_estimates(
    num_trees: int, cap: int, seed: int = 0, **changes: Any
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Weighted and plain mean over the leaves of each tree, for each statistic of the Markov chain."""
    config = make_config(8, segment_length=4, max_completion_length=cap, **changes)
    trees = TreeSampler(MarkovEngine(1, seed), config, [EOS]).sample([[9]] * num_trees, seed=seed)
    weighted: dict[str, list[float]] = {name: [] for name in MarkovEngine.exact(cap)}
    plain: dict[str, list[float]] = {name: [] for name in weighted}
    for tree in trees:
        observed = [MarkovEngine.observed(tree.completion_ids(leaf)) for leaf in tree.leaves]
        for name in weighted:
            values = [each[name] for each in observed]
            weighted[name].append(sum(w * v for w, v in zip(tree.leaf_weights(), values, strict=True)))
            plain[name].append(statistics.mean(values))
    return weighted, plain


@pytest.mark.parametrize("schedule", ["early", "spread"])
@pytest.mark.parametrize("policy", ["uniform", "low_prob", "high_prob", "entropy"])
def test_leaf_weights_undo_the_tilt_of_branching(schedule: str, policy: str) -> None:
    """Without fallback the weighted means are those of independent completions, and the plain ones are not."""
    cap = 40
    weighted, plain = markov_estimates(
        1500,
        cap,
        branch_schedule=schedule,
        branching_policy=policy,
        branching_temperature=0.3,
        fallback_policy="none",
    )
    for name, exact in MarkovEngine.exact(cap).items():
        assert abs(statistics.mean(weighted[name]) - exact) < 4 * standard_error(weighted[name]), name
    for name in ("length", "threes"):
        bias = statistics.mean(plain[name]) - MarkovEngine.exact(cap)[name]
        assert abs(bias) > 6 * standard_error(plain[name]), name


@pytest.mark.parametrize("schedule", ["early", "spread", "sqrt"])
@pytest.mark.parametrize("fallback", ["random", "root", "low_prob"])
def test_the_leaves_of_a_fallback_have_no_weight_and_the_others_are_exact(fallback: str, schedule: str) -> None:
    cap = 40
    weighted, _ = markov_estimates(1500, cap, fallback_policy=fallback, branch_schedule=schedule)
    for name, exact in MarkovEngine.exact(cap).items():
        assert abs(statistics.mean(weighted[name]) - exact) < 4 * standard_error(weighted[name]), name


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5
