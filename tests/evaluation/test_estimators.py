"""pass@k, maj@k, mean@k and their intervals: hand arithmetic, and exact values over all trees of a policy."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.support.fakes import EOS, FakeEngine, memoryless
from tests.support.markov import every_tree
from tests.support.sampling import make_config
from treepo_trl.evaluation import (
    Draw,
    Estimate,
    Judgement,
    Subtree,
    default_ks,
    estimates,
    majority_at_k,
    mean_score,
    pass_at_k,
    subtrees_of,
)
from treepo_trl.evaluation import estimators as estimators_module
from treepo_trl.sampling import TreeSampler
from treepo_trl.sampling.first_widths import num_first_branches


def judgement(answer: str | None) -> Judgement:
    return Judgement(1.0, "r") if answer == "r" else Judgement(0.0, answer)


def independent(answers: Sequence[str | None]) -> list[Subtree]:
    return [[Draw(1.0, judgement(answer))] for answer in answers]


def about(value: float) -> Any:
    """Four standard deviations of the mean of 2000 elections."""
    return pytest.approx(value, abs=4 * 0.5 / 2000**0.5)


def test_hand_arithmetic_of_independent_completions() -> None:
    """
    r r a b: of the 4 choices of 3, two have both r (right), two have r a b (a tie of three). Of the 6 choices of 2,
    one has no r (a b), one both, four are a tie of r and another.
    """
    subtrees = independent(["r", "r", "a", "b"])
    assert mean_score(subtrees) == 0.5
    assert pass_at_k(subtrees, 1) == 0.5
    assert pass_at_k(subtrees, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(subtrees, 3) == pass_at_k(subtrees, 4) == 1.0
    assert majority_at_k(subtrees, 1) == about(0.5)
    assert majority_at_k(subtrees, 2) == about((1 + 4 * 0.5) / 6)
    assert majority_at_k(subtrees, 3) == about((1 + 1 + 1 / 3 + 1 / 3) / 4)
    assert majority_at_k(subtrees, 4) == 1.0


def test_hand_arithmetic_of_a_tree() -> None:
    """
    One child of the prompt has a right leaf and one that says a, of weight 1/2 each; the other says a. Two independent
    completions are then r a (a tie) or a a, equally likely.
    """
    subtrees = [[Draw(0.5, judgement("r")), Draw(0.5, judgement("a"))], [Draw(1.0, judgement("a"))]]
    assert mean_score(subtrees) == pass_at_k(subtrees, 1) == 0.25
    assert pass_at_k(subtrees, 2) == 0.5
    assert [majority_at_k(subtrees, k) for k in (1, 2)] == [about(0.25)] * 2


def test_a_completion_without_an_answer_has_no_vote() -> None:
    assert majority_at_k(independent(["r", None, None]), 3) == 1.0
    assert majority_at_k(independent([None, None]), 2) == 0.0
    assert majority_at_k(independent(["r", "a", "a", None]), 4) == 0.0


def test_a_partial_score_counts_for_the_mean_alone() -> None:
    subtrees = [[Draw(1.0, Judgement(0.5, "a"))], [Draw(1.0, Judgement(1.0, "b"))]]
    assert (mean_score(subtrees), pass_at_k(subtrees, 1), majority_at_k(subtrees, 2)) == (0.75, 0.5, 0.5)


@pytest.mark.parametrize("estimate", [pass_at_k, majority_at_k])
@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_independent_samples(estimate: Callable[[list[Subtree], int], float], k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; it must be between 1 and the 2 independent samples"):
        estimate(independent(["r", "a"]), k)


def test_default_ks_are_powers_of_two() -> None:
    assert [default_ks(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def share_of_right(votes: Sequence[str | None]) -> float:
    """An election by hand: the right answer's part of the first place."""
    counts = Counter(vote for vote in votes if vote is not None)
    winners = [vote for vote in counts if counts[vote] == max(counts.values())]
    return 1 / len(winners) if "r" in winners else 0.0


def test_estimates_are_those_of_all_choices(rng: random.Random) -> None:
    errors: list[float] = []
    for seed in range(60):
        votes = [rng.choice(["r", "r", "a", "b", "c", None]) for _ in range(rng.randint(1, 7))]
        right = votes.count("r")
        for k in range(1, len(votes) + 1):
            choices = list(itertools.combinations(votes, k))
            majority = sum(map(share_of_right, choices)) / len(choices)
            errors.append(majority_at_k(independent(votes), k, seed) - majority)
            expected = 1 - math.comb(len(votes) - right, k) / math.comb(len(votes), k)
            assert pass_at_k(independent(votes), k) == pytest.approx(expected, abs=1e-12)
        assert errors[-1] == pytest.approx(0, abs=1e-12)  # all of them vote
    assert errors == [about(0)] * len(errors)
    assert sum(errors) / len(errors) == pytest.approx(0, abs=0.002)


def test_another_seed_draws_other_elections() -> None:
    drawn = [majority_at_k(independent(["r", "r", "a", "b"]), 3, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


# Trees of a policy that can be enumerated

POLICY = ((0.2, 0.5, 0.3), (0.1, 0.6, 0.3), (0.5, 0.2, 0.3))
"""From the prompt, from 1 and from 2: to EOS, 1 and 2."""
ANSWERS = {(EOS,): None, (1, EOS): "a", (1, 1): "r", (1, 2): "b", (2, EOS): "r", (2, 1): "a", (2, 2): "r"}
COMPLETIONS = {path: POLICY[0][path[0]] * (POLICY[path[0]][path[1]] if len(path) > 1 else 1.0) for path in ANSWERS}


def exact_pass_at_k(k: int) -> float:
    return 1 - (1 - sum(p for path, p in COMPLETIONS.items() if ANSWERS[path] == "r")) ** k


def exact_majority_at_k(k: int) -> float:
    return sum(
        math.prod(COMPLETIONS[path] for path in paths) * share_of_right([ANSWERS[path] for path in paths])
        for paths in itertools.product(COMPLETIONS, repeat=k)
    )


@pytest.mark.parametrize(
    ("first", "width", "changes"),
    [
        (2, 4, {"fallback_policy": "none"}),
        (2, 3, {"fallback_policy": "root"}),
        (3, 4, {"fallback_policy": "none", "branching_policy": "low_prob"}),
        (3, 3, {"fallback_policy": "none"}),
        *((2, 4, {"fallback_policy": "random", "branching_policy": policy}) for policy in ("high_prob", "entropy")),
        (2, 4, {"fallback_policy": "low_prob", "branch_schedule": "spread"}),
    ],
)
def test_trees_are_unbiased_up_to_the_children_of_the_prompt(
    first: int, width: int, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The mean over all trees, by their probability, is the exact value of independent completions. Where paths end
    decides how many children the others get, so the leaves of a tree are not independent: counted as if they were,
    they are wrong, which shows that this test can fail.
    """
    monkeypatch.setattr(estimators_module, "_NUM_ELECTIONS", 50)  # for each of many trees
    shape = {"max_completion_length": 2, "segment_length": 1, "initial_branching_factor": [first]}
    config = make_config(width, **shape, **changes)
    assert num_first_branches(config) == first
    total, naive = 0.0, 0.0
    sums: Counter[str] = Counter()
    trees, chances = every_tree(config, 1, POLICY)
    for seed, (tree, probability) in enumerate(zip(trees, chances.tolist(), strict=True)):
        judgements = [judgement(ANSWERS[tuple(tree.completion_ids(leaf))]) for leaf in tree.leaves]
        subtrees = subtrees_of(tree, judgements)
        assert len(subtrees) == first
        total += probability
        sums["mean"] += probability * mean_score(subtrees)
        for k in range(1, first + 1):
            sums[f"pass@{k}"] += probability * pass_at_k(subtrees, k)
            sums[f"maj@{k}"] += probability * majority_at_k(subtrees, k, seed)
        as_if = [[Draw(1.0, each)] for each in judgements]
        naive += probability * pass_at_k(as_if, 2)
    assert total == pytest.approx(1.0)
    assert sums["mean"] == pytest.approx(exact_pass_at_k(1))
    for k in range(1, first + 1):
        assert sums[f"pass@{k}"] == pytest.approx(exact_pass_at_k(k))
        assert sums[f"maj@{k}"] == pytest.approx(exact_majority_at_k(k), abs=0.01)
    if width > first:
        assert abs(naive - exact_pass_at_k(2)) > 0.005


@pytest.mark.parametrize(
    "changes",
    [
        {"branch_schedule": "sqrt"},
        {"branch_schedule": "sqrt", "expected_completion_length": 5},
        {"branch_schedule": "spread"},
        {"initial_branching_factor": [3, 6]},
        {"branching_factor": 1},
        {"fallback_policy": "random"},
    ],
)
def test_every_tree_has_as_many_subtrees_as_is_promised(changes: dict[str, object]) -> None:
    config = make_config(8, **{"max_completion_length": 40, "segment_length": 4, **changes})
    trees = TreeSampler(FakeEngine(memoryless(0.1)), config, [EOS]).sample([[9]] * 40, seed=0)
    for tree in trees:
        subtrees = subtrees_of(tree, [judgement("r")] * len(tree.leaves))
        assert len(subtrees) >= num_first_branches(config)
        assert [sum(draw.weight for draw in subtree) for subtree in subtrees] == pytest.approx([1.0] * len(subtrees))


def test_one_prompt_and_equal_prompts_have_no_width() -> None:
    assert estimates({"a": [0.25]})["a"] == Estimate(0.25, 0.25, 0.25)
    assert estimates({"a": [0.5] * 9})["a"] == Estimate(0.5, 0.5, 0.5)


def test_interval_of_many_prompts_is_that_of_the_normal_distribution() -> None:
    """400 prompts, half of them right: a standard error of 0.5 / 20, so 0.5 -+ 1.96 * 0.025."""
    estimate = estimates({"a": [0.0, 1.0] * 200})["a"]
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == pytest.approx((0.451, 0.549), abs=0.004)


def test_all_metrics_are_drawn_on_the_same_prompts() -> None:
    """A difference of equal prompts is sure, however unsure both sides are."""
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = estimates({"a": values, "b": [1 - value for value in values]})
    assert found["a"].low == pytest.approx(1 - found["b"].high)
    assert estimates({"a": values}) == {"a": found["a"]}
