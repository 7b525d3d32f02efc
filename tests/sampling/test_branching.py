"""Budgets, splits and stems: the paper's numbers by hand, laws by hypothesis."""

import math
import random
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_trl.sampling.branching import (
    BRANCHING_SCORES,
    SCHEDULES,
    BranchingPolicy,
    BranchSchedule,
    FallbackCandidates,
    FallbackPolicy,
    annealed,
    branching_scores,
    draw_initial_branching,
    fallback_stems,
    level_budget,
    split_budget,
    spread_width,
)
from treepo_trl.sampling.tree import FinishReason, SegmentNode, SegmentTree


# Choices


def test_each_choice_of_a_setting_is_one_that_the_code_knows(rng: random.Random) -> None:
    assert tuple(BRANCHING_SCORES) == get_args(BranchingPolicy)
    assert tuple(SCHEDULES) == get_args(BranchSchedule)
    # Every fallback and every kind of candidates is drawn below; one that the code does not know is an error.
    with pytest.raises(AssertionError, match="middle"):
        fallback_stems(chain(["stop"]), 1, 1, "middle", rng)
    with pytest.raises(AssertionError, match="longest"):
        fallback_stems(chain(["stop"]), 1, 1, "random", rng, "longest")


# Initial branching


def test_a_range_draws_both_ends_and_everything_between(rng: random.Random) -> None:
    drawn = Counter(draw_initial_branching([2, 8], 16, rng) for _ in range(700))
    assert set(drawn) == set(range(2, 9))
    # 700 draws over 7 values: mean 100, standard deviation sqrt(700 * 1/7 * 6/7) = 9.3; 40 is more than 4 of them.
    assert all(abs(count - 100) < 40 for count in drawn.values())


def test_the_initial_branching_never_exceeds_the_width(rng: random.Random) -> None:
    assert draw_initial_branching((5, 5), 16, rng) == 5
    assert draw_initial_branching((8, 8), 3, rng) == 3
    assert {draw_initial_branching((2, 8), 3, rng) for _ in range(50)} == {2, 3}


# Level budget


@pytest.mark.parametrize(
    ("width", "factor", "live", "finished", "finished_now", "budget"),
    [
        # max(min(W - F, N * (f + A)), A)
        (16, 2, 2, 0, 0, 4),  # min(16, 4): plain doubling
        (16, 2, 8, 0, 0, 16),  # the last doubling
        (16, 2, 16, 0, 0, 16),  # min(16, 32) = 16: no branching any more
        (32, 4, 4, 0, 0, 16),
        (10, 3, 9, 0, 0, 10),  # min(10, 27)
        (16, 2, 3, 1, 1, 8),  # one of four finished: min(15, 8) = 8, its share goes to the other three
        (16, 2, 1, 3, 3, 8),  # three of four finished: the one that is left takes all 8
        (16, 2, 5, 11, 3, 5),  # min(5, 16) = 5 = A
        (16, 2, 9, 7, 7, 9),  # min(9, 32) = 9: everyone goes on, nobody branches
        (16, 2, 2, 13, 0, 3),  # min(3, 4) = 3
        (16, 1, 5, 3, 3, 8),  # N = 1: a level opens no more than the one before had
    ],
)
def test_level_budget_is_the_papers_formula(
    width: int, factor: int, live: int, finished: int, finished_now: int, budget: int
) -> None:
    assert level_budget(live, finished, finished_now, width, factor) == budget


@given(st.integers(1, 64), st.integers(1, 8), st.data())
def test_level_budget_never_exceeds_the_width_and_never_kills_a_path(
    width: int, factor: int, data: st.DataObject
) -> None:
    finished = data.draw(st.integers(0, width - 1))
    live = data.draw(st.integers(1, width - finished))
    finished_now = data.draw(st.integers(0, finished))
    budget = level_budget(live, finished, finished_now, width, factor)
    assert live <= budget <= width - finished


# Schedules


def test_what_each_schedule_opens_by_hand() -> None:
    """
    Segments of 10 tokens of W = 16 paths that all have 40. `spread` opens 16 ** (1/4), 16 ** (2/4) and so on, and
    `sqrt` the square root of the depth.
    """
    levels = {name: [each.most_open(end, 40, 16) for end in (10, 20, 30, 40)] for name, each in SCHEDULES.items()}
    assert levels == {"early": [16] * 4, "spread": [2, 4, 8, 16], "sqrt": [16] * 4}
    widths = {name: each.widths([10.0] * 4, [1.0] * 4, 16) for name, each in SCHEDULES.items() if each.widths}
    assert widths == {"sqrt": pytest.approx([8, 8 * math.sqrt(2), 8 * math.sqrt(3), 16], rel=1e-12)}


def test_spread_width_by_hand() -> None:
    # W = 8 over 6 tokens: 8 ** (d/6) = 2 ** (d/2) = 1.41, 2, 2.83, 4, 5.66, 8, rounded up
    assert [spread_width(end, 6, 8) for end in range(1, 7)] == [2, 2, 3, 4, 6, 8]


@given(st.integers(1, 128), st.integers(1, 500), st.integers(1, 64))
def test_spread_width_is_monotone_and_reaches_the_width_with_the_last_segment(
    width: int, expected: int, segment: int
) -> None:
    widths = [spread_width(start + segment, expected, width) for start in range(0, expected, segment)]
    assert widths == sorted(widths)
    assert widths[-1] == width
    assert widths[0] >= 1
    assert spread_width(expected + 3, expected, width) == width  # a path that is longer than expected


# Split


SCORES = st.lists(st.floats(-5, 0) | st.floats(-1e4, 1e4), min_size=1, max_size=20)


@given(SCORES, st.integers(0, 60), st.integers(0, 99), st.floats(1e-3, 1e3))
def test_a_split_hands_out_everything_everyone_gets_one_and_a_higher_score_never_fewer(
    scores: list[float], spare: int, seed: int, temperature: float
) -> None:
    counts = split_budget(len(scores) + spare, scores, random.Random(seed), temperature)
    assert len(counts) == len(scores)
    assert sum(counts) == len(scores) + spare
    assert min(counts) >= 1
    assert all(
        counts[i] >= counts[j]
        for i, a in enumerate(scores)
        for j, b in enumerate(scores)
        if a > b + 1e-9 * max(abs(b), 1.0)
    )


def test_ties_between_equal_scores_go_round() -> None:
    rng = random.Random(0)
    firsts = Counter(split_budget(3, [0.5, 0.5], rng).index(2) for _ in range(200))
    assert all(60 < firsts[i] < 140 for i in (0, 1))  # 100 each, standard deviation 7


def test_largest_remainder_by_hand(rng: random.Random) -> None:
    # exp(score) = 1, 2, 4 (temperature 1), sum 7; spare 5: 5/7, 10/7, 20/7 = 0.71, 1.43, 2.86; floors 0, 1, 2 leave 2
    # for the largest remainders 0.86 and 0.71. With one each: 1+0+1, 1+1, 1+2+1.
    assert split_budget(8, [0.0, 0.6931471805599453, 1.3862943611198906], rng) == [2, 2, 4]


def test_temperature_flattens_the_split(rng: random.Random) -> None:
    # weights at T = 1: 1, e**2 = 7.39; of 9 spare 1.07 and 7.93 -> 1, 8. At T = 2: 1, e; 2.42 and 6.58 -> 2, 7.
    # At T = 1000: 4.4955 and 4.5045, the higher score has the larger remainder -> 4, 5.
    scores = [0.0, 2.0]
    assert split_budget(11, scores, rng, 1.0) == [2, 9]
    assert split_budget(11, scores, rng, 2.0) == [3, 8]
    assert split_budget(11, scores, rng, 1000.0) == [5, 6]


# Scores


def segments(logprobs: list[list[float]], entropies: list[float | None] | None = None) -> list[SegmentNode]:
    return [
        SegmentNode(None, [1] * len(values), values, entropy=entropy)
        for values, entropy in zip(logprobs, entropies or [None] * len(logprobs), strict=True)
    ]


def test_scores_are_mean_log_probabilities_of_the_last_segment() -> None:
    nodes = segments([[-1.0, -3.0], [-0.5]])  # means -2 and -0.5
    assert branching_scores("uniform", nodes) is None
    assert branching_scores("high_prob", nodes) == pytest.approx([-2.0, -0.5])
    assert branching_scores("low_prob", nodes) == pytest.approx([2.0, 0.5])


def test_entropy_scores_by_the_distributions_not_by_the_drawn_tokens() -> None:
    # The first path drew unlikely tokens from narrow distributions.
    nodes = segments([[-9.0, -9.0], [-0.1, -0.1]], [0.2, 2.5])
    assert branching_scores("entropy", nodes) == [0.2, 2.5]


def test_entropy_without_entropies_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="branching_policy='entropy' needs entropies"):
        branching_scores("entropy", segments([[-1.0], [-1.0]], [0.2, None]))


def test_the_temperature_goes_from_start_to_end_along_half_a_cosine() -> None:
    # Section 4.4: 5 to 1. Half way it is the middle; a quarter in, 3 + 2 cos(45 degrees).
    assert annealed(5.0, 1.0, 0.0) == 5.0
    assert annealed(5.0, 1.0, 0.25) == pytest.approx(3.0 + 2.0 * 0.5**0.5)
    assert annealed(5.0, 1.0, 0.5) == pytest.approx(3.0)
    assert annealed(5.0, 1.0, 1.0) == pytest.approx(1.0)
    assert annealed(5.0, 1.0, 1.5) == pytest.approx(1.0)  # a run that goes on past its plan
    assert annealed(1.0, 5.0, 0.5) == pytest.approx(3.0)  # ascending works too
    assert annealed(2.0, None, 0.7) == 2.0


# Fallback


def chain(reasons: list[str | None], logprobs: list[list[float]] | None = None) -> SegmentTree:
    """A path of three segments (nodes 0, 1, 2) that ends with `reasons[0]`, and one-segment leaves for the others."""
    tree = SegmentTree([9])
    values = logprobs or [[-1.0], [-2.0], [-3.0]]
    tree.add(None, [1] * len(values[0]), values[0])
    tree.add(0, [2] * len(values[1]), values[1])
    tree.add(1, [3] * len(values[2]), values[2], reasons[0])
    for reason in reasons[1:]:
        tree.add(None, [4], [-1.0], reason)
    return tree


def fork(reasons: list[str]) -> tuple[SegmentTree, list[int]]:
    """Paths of two segments, of which the second is less likely, that end with `reasons`; and their first nodes."""
    tree = SegmentTree([1])
    inner = [tree.add(None, [1], [-1.0]) for _ in reasons]
    for node, reason in zip(inner, reasons, strict=True):
        tree.add(node, [2], [-5.0], reason)
    return tree, inner


def test_random_cuts_at_every_boundary_equally_often_the_root_included(rng: random.Random) -> None:
    # Path 0-1-2: the stem is the prompt, node 0 or node 1; never the finished node 2.
    stems = Counter(fallback_stems(chain(["stop"]), 1, 2, "random", rng)[0] for _ in range(600))
    assert set(stems) == {None, 0, 1}
    assert all(abs(count - 200) < 60 for count in stems.values())  # standard deviation 11.5


@pytest.mark.parametrize(
    ("logprobs", "stem"),
    [
        ([[-3.0], [-1.0], [-2.0]], None),  # the first segment is the least likely: cut in front of it
        ([[-1.0], [-3.0], [-2.0]], 0),
        ([[-1.0], [-2.0], [-3.0]], 1),
        # the mean counts, not the sum: -1.5 over four tokens sums to -6 and is more likely than one token of -2
        ([[-1.5] * 4, [-2.0], [-1.0]], 0),
    ],
)
def test_low_prob_cuts_in_front_of_the_least_likely_segment(
    logprobs: list[list[float]], stem: int | None, rng: random.Random
) -> None:
    assert fallback_stems(chain(["stop"], logprobs), 2, 2, "low_prob", rng) == [stem, stem]


def test_low_prob_without_log_probabilities_says_what_is_missing(rng: random.Random) -> None:
    tree = SegmentTree([1])
    tree.add(None, [1], None, "stop")
    with pytest.raises(ValueError, match="'low_prob' and 'high_prob' policies need log-probabilities"):
        fallback_stems(tree, 1, 2, "low_prob", rng)


@pytest.mark.parametrize("reason", ["stop", "pattern"])
@pytest.mark.parametrize("policy", ["random", "low_prob"])
@pytest.mark.parametrize("candidates", ["finished", "finished_first"])
def test_ended_paths_come_before_repetitions_and_long_ones(
    reason: str, policy: str, candidates: str, rng: random.Random
) -> None:
    tree, (*_, good) = fork([*rng.choices(["repetition", "length"], k=4), reason])
    for _ in range(20):
        assert set(fallback_stems(tree, 3, 1, policy, rng, candidates)) <= {None, good}


@pytest.mark.parametrize("reason", ["repetition", "length"])
def test_when_no_path_ended_the_papers_rule_starts_from_the_prompt(reason: str, rng: random.Random) -> None:
    assert fallback_stems(chain([reason]), 2, 2, "low_prob", rng) == [None, None]
    assert fallback_stems(chain([reason]), 2, 2, "low_prob", rng, "finished_first") == [1, 1]


@pytest.mark.parametrize("reason", ["stop", "repetition", "length"])
def test_all_paths_may_be_cut_alike(reason: str, rng: random.Random) -> None:
    # Of four paths one ended; all four serve, each with one child.
    tree, inner = fork(["stop", reason, "length", "repetition"])
    assert sorted(fallback_stems(tree, 4, 1, "low_prob", rng, "all")) == inner


def test_a_stem_gets_branching_factor_children_before_the_next_path_serves(rng: random.Random) -> None:
    # Two paths, N = 3, 7 missing: 3 to the one, 3 to the other, 1 to whoever comes first in the next round.
    tree, inner = fork(["stop", "stop"])
    stems = fallback_stems(tree, 7, 3, "low_prob", rng)
    assert sorted(Counter(stems).values()) == [3, 4]
    assert set(stems) == set(inner)
    assert stems[0] == stems[1] == stems[2] != stems[3] == stems[4] == stems[5]


def test_every_finished_path_is_as_likely_to_serve(rng: random.Random) -> None:
    tree, inner = fork(["stop"] * 3)
    stems = Counter(fallback_stems(tree, 1, 2, "low_prob", rng)[0] for _ in range(600))
    assert set(stems) == set(inner)
    assert all(abs(count - 200) < 60 for count in stems.values())  # standard deviation 11.5


@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from(get_args(FallbackPolicy)),
    st.lists(st.sampled_from(get_args(FinishReason)), min_size=1, max_size=5),
    st.integers(0, 99),
    st.sampled_from(get_args(FallbackCandidates)),
)
def test_stems_are_as_many_as_missing_are_inner_nodes_and_repeat(
    missing: int, factor: int, policy: str, reasons: list[str], seed: int, candidates: str
) -> None:
    tree = chain(reasons)
    leaves = list(tree.leaves)
    stems = fallback_stems(tree, missing, factor, policy, random.Random(seed), candidates)
    assert tree.leaves == leaves
    assert len(stems) == (0 if policy == "none" else missing)
    assert all(stem is None or tree.nodes[stem].finish_reason is None for stem in stems)
    if policy == "root":
        assert stems == [None] * missing
    assert stems == fallback_stems(tree, missing, factor, policy, random.Random(seed), candidates)
