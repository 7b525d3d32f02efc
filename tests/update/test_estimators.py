"""Which tree estimators have the policy gradient as their mean, on a Markov chain whose gradient is known."""

from functools import cache
from typing import Any

import pytest
import torch

from tests.support.fakes import MarkovEngine
from tests.support.markov import PROBABILITIES, estimated_gradient, exact_gradient, sample_trees
from treepo_trl import SegmentTree


CAP, WIDTH, NUM_TREES = 12, 8, 3000


@cache
def trees_of(**changes: Any) -> list[SegmentTree]:
    """The same trees for every estimator."""
    return sample_trees(NUM_TREES, WIDTH, CAP, **changes)


def z_scores(estimator: str, leaf_weighting: str, **changes: object) -> tuple[torch.Tensor, float]:
    """Errors of the mean over trees in standard errors, and the mean's part along the exact gradient (1 if exact)."""
    exact = exact_gradient(CAP)
    trees = trees_of(**changes)
    estimates = torch.stack([estimated_gradient(tree, estimator, leaf_weighting) for tree in trees])
    errors = estimates.std(0) / NUM_TREES**0.5
    is_random = errors > 0  # state 0 is only ever the prompt's, and nothing leaves EOS
    mean = estimates.mean(0)
    return ((mean - exact) / errors)[is_random], ((mean * exact).sum() / (exact * exact).sum()).item()


def test_the_exact_gradient_is_the_change_of_the_exact_reward() -> None:
    gradient = exact_gradient(CAP)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4, dtype=torch.float64))  # a constant added to a row
    step = 1e-6 * torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = MarkovEngine.exact(CAP)["from_three"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MarkovEngine, "TRANSITIONS", (PROBABILITIES.log() + step).softmax(-1).tolist())
        after = MarkovEngine.exact(CAP)["from_three"]
    assert (after - before) == pytest.approx((gradient * step).sum().item(), rel=1e-3)


EARLY = {"branch_schedule": "early"}
SPREAD = {"branch_schedule": "spread"}
SQRT = {"branch_schedule": "sqrt", "expected_completion_length": 6}


@pytest.mark.parametrize(
    ("estimator", "leaf_weighting", "changes"),
    [
        *(("leave_one_out", "inverse_branching", {**EARLY, "branching_factor": factor}) for factor in (2, 4)),
        *(("leave_one_out", "inverse_branching", {**SPREAD, "branching_factor": factor}) for factor in (2, 4)),
        ("leave_one_out", "uniform", {"branching_factor": 1}),  # RLOO
        *(("optimal_baseline", "inverse_branching", changes) for changes in (EARLY, SPREAD, SQRT)),
        ("optimal_baseline", "uniform", {"branching_factor": 1}),
    ],
)
def test_exact_estimators_are_the_policy_gradient(
    estimator: str, leaf_weighting: str, changes: dict[str, Any]
) -> None:
    scores, along = z_scores(estimator, leaf_weighting, **changes)
    assert scores.abs().max() < 4.5
    assert along == pytest.approx(1, abs=0.1)


def test_uniform_weights_have_the_gradient_of_another_distribution() -> None:
    scores, _ = z_scores("leave_one_out", "uniform")
    assert scores.abs().max() > 8


@pytest.mark.parametrize("estimator", ["grpo", "treepo", "treepo_size_weighted", "treepo_segment", "value_difference"])
def test_baselines_that_hold_the_segment_itself_shorten_the_gradient(estimator: str) -> None:
    scores, along = z_scores(estimator, "inverse_branching")
    assert along < 0.9
    assert scores.abs().max() > 8


def test_treerl_has_another_gradient_too() -> None:
    """A sum of two differences, so it is not shorter; but it is turned. 4.5 is what an exact one stays below above."""
    scores, _ = z_scores("treerl", "inverse_branching")
    assert scores.abs().max() > 6
