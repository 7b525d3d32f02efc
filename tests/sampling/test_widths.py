"""Widths of trees, and which path branches first: the least noise, by comparison with every other choice."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import EOS, MarkovEngine
from tests.support.sampling import make_config
from treepo_trl.sampling import TreeSampler
from treepo_trl.sampling.widths import heaviest_first, square_root_widths


WEIGHTS = st.lists(st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.4, 1.0]), min_size=1, max_size=4)

SQRT = {"branch_schedule": "sqrt", "fallback_policy": "none", "segment_length": 2}


def noise_of(weights: list[float], counts: tuple[int, ...] | list[int]) -> float:
    return sum(weight**2 / count for weight, count in zip(weights, counts, strict=True))


@given(WEIGHTS, st.integers(0, 5), st.integers())
def test_no_other_split_has_less_noise(weights: list[float], spare: int, seed: int) -> None:
    total = len(weights) + spare
    counts = heaviest_first(weights, total, random.Random(seed))
    others = itertools.product(range(1, spare + 2), repeat=len(weights))
    least = min(noise_of(weights, each) for each in others if sum(each) == total)
    assert sum(counts) == total
    assert min(counts) >= 1
    assert noise_of(weights, counts) == pytest.approx(least)


@given(WEIGHTS, st.integers(0, 9), st.permutations(range(4)))
def test_permuted_paths_have_permuted_children(weights: list[float], spare: int, order: list[int]) -> None:
    weights = [weight * (1 + 1e-3 * i) for i, weight in enumerate(weights)]  # no ties
    order = [i for i in order if i < len(weights)]
    counts = heaviest_first(weights, len(weights) + spare, random.Random(0))
    permuted = heaviest_first([weights[i] for i in order], len(weights) + spare, random.Random(1))
    assert permuted == [counts[i] for i in order]


def test_paths_that_are_alike_split_evenly_and_the_rest_by_chance() -> None:
    splits = [heaviest_first([0.25] * 4, 6, random.Random(seed)) for seed in range(400)]
    assert all(sorted(split) == [1, 1, 2, 2] for split in splits)
    means = [statistics.mean(column) for column in zip(*splits, strict=True)]
    assert all(mean == pytest.approx(1.5, abs=0.15) for mean in means)


def noise_times_price(widths: list[float], tokens: list[float], alive: list[float]) -> float:
    """Of widths by depth, where a depth resolves variance in proportion to its tokens."""
    lengths = list(itertools.accumulate(c / a for c, a in zip(tokens, alive, strict=True)))
    noise = sum(c * length / n for c, length, n in zip(tokens, lengths, widths, strict=True))
    return noise * sum(c * n for c, n in zip(tokens, widths, strict=True))


@given(st.lists(st.tuples(st.floats(0.1, 2), st.floats(0.5, 1)), min_size=2, max_size=5), st.integers())
def test_no_other_widths_have_less_noise_for_the_price(depths: list[tuple[float, float]], seed: int) -> None:
    alive = list(itertools.accumulate((share for _, share in depths), lambda before, share: before * share))
    alive = [1.0, *alive[1:]]
    tokens = [c for c, _ in depths]
    widths = square_root_widths(tokens, alive, 16)
    best = noise_times_price(widths, tokens, alive)
    rng = random.Random(seed)
    for _ in range(50):
        other = [n * math.exp(rng.gauss(0, 0.3)) for n in widths]
        assert best <= noise_times_price(other, tokens, alive) * (1 + 1e-12)
    ending = [a - b for a, b in zip(alive, [*alive[1:], 0.0], strict=True)]
    assert sum(n * share for n, share in zip(widths, ending, strict=True)) == pytest.approx(16)


def test_paths_that_have_ended_take_their_share_of_the_width_with_them() -> None:
    """One width everywhere never branches again: as many leaves as that, of a tree that may have more."""
    config = make_config(16, **SQRT, max_completion_length=24)
    trees = TreeSampler(MarkovEngine(1, 0), config, [EOS]).sample([[9]] * 50, 0, widths=[4.0] * 12)
    assert {len(tree.leaves) for tree in trees} == {4}


@given(st.floats(0, 12), st.integers(2, 9), st.integers())
def test_a_prompt_has_two_children_at_least(width: float, num_generations: int, seed: int) -> None:
    """However narrow its tree may begin: the advantage of a first segment is what sets it apart from its siblings."""
    config = make_config(num_generations, **SQRT, max_completion_length=4)
    (tree,) = TreeSampler(MarkovEngine(1, 0), config, [EOS]).sample([[9]], seed, widths=[width, 9.0])
    number = min(max(width, 2), num_generations)
    assert math.floor(number) <= len(tree.root_children) <= math.ceil(number)


def test_widths_by_hand() -> None:
    """Half of the weight ends with the first segment of 4 tokens; the others have another 4, so S = 4 and 8 tokens."""
    # n ~ sqrt(4), sqrt(8); a tree of n, sqrt(2) n has n / 2 + sqrt(2) n / 2 leaves.
    first = 12 / (1 + math.sqrt(2))
    assert square_root_widths([4.0, 2.0], [1.0, 0.5], 6) == pytest.approx([first, math.sqrt(2) * first])


def test_the_schedule_opens_as_many_paths_as_its_widths() -> None:
    """Of a chain in which nothing ends, levels have the rounded widths, and the leaves are all there."""
    engine = MarkovEngine(1, 0)
    engine.TRANSITIONS = ((0, 0.5, 0.3, 0.2),) * 4  # pyright: ignore[reportAttributeAccessIssue]
    config = make_config(12, **{**SQRT, "fallback_policy": "random"}, max_completion_length=18)
    widths = square_root_widths([1.0] * 9, [1.0] * 9, 12)
    counts: list[list[int]] = []
    for tree in TreeSampler(engine, config, [EOS]).sample([[9]] * 200, 0):
        counts.append([sum(node.depth == depth for node in tree.nodes) for depth in range(9)])
        assert len(tree.leaves) == 12
    means = [statistics.mean(column) for column in zip(*counts, strict=True)]
    assert means == pytest.approx(widths, abs=0.15)
