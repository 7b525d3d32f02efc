"""Which tree estimators have the policy gradient as their mean, on a Markov chain whose gradient is known."""

import statistics
from functools import cache
from typing import Any

import pytest
import torch

from tests.support.fakes import MarkovEngine
from tests.support.markov import (
    PROBABILITIES,
    estimated_gradients,
    every_tree,
    exact_gradient,
    gradient_of,
    reward_of,
    sample_trees,
)
from tests.support.sampling import make_config
from treepo_trl import SegmentTree
from treepo_trl.update.advantages import leaf_paths
from treepo_trl.update.row_advantages import weighted_advantages


CAP, WIDTH, NUM_TREES = 12, 8, 3000


@cache
def trees_of(**changes: Any) -> list[SegmentTree]:
    """The same trees for every estimator."""
    return sample_trees(NUM_TREES, WIDTH, CAP, **changes)


def z_scores(estimator: str, leaf_weighting: str, times: float = 1.0, **changes: object) -> tuple[torch.Tensor, float]:
    """Errors of the mean over trees in standard errors, and the mean's part along `times` the exact gradient."""
    exact = times * exact_gradient(CAP)
    trees = trees_of(**changes)
    estimates = estimated_gradients(trees, estimator, leaf_weighting)
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


@pytest.mark.parametrize("estimator", ["leave_one_out", "optimal_baseline"])
@pytest.mark.parametrize("changes", [EARLY, SQRT])
def test_fallbacks_to_the_prompt_are_trees_of_their_own(estimator: str, changes: dict[str, Any]) -> None:
    """Each leaf of a fallback brings 1 / W of the gradient on top: the mean keeps its direction."""
    changes = {**changes, "fallback_policy": "root"}
    trees = trees_of(**changes)
    num_late = statistics.mean(sum(node.wave > 0 for node in tree.nodes if node.depth == 0) for tree in trees)
    assert num_late > 0.1
    scores, along = z_scores(estimator, "inverse_branching", 1 + num_late / WIDTH, **changes)
    assert scores.abs().max() < 4.5
    assert along == pytest.approx(1, abs=0.1)


def test_a_fallback_to_a_stem_adds_the_gradient_behind_it() -> None:
    """Given the tree before it, what a fallback adds has the mean of 1 / W of each stem's own gradient."""
    trees = trees_of(fallback_policy="random")
    errors: list[torch.Tensor] = []
    for tree in trees[:1500]:
        ids, _ = leaf_paths([tree])
        rewards = torch.tensor([[reward_of(tree, leaf) for leaf in tree.leaves]], dtype=torch.float64)
        values = weighted_advantages([tree], ids, rewards, "leave_one_out")[0]
        is_late = torch.tensor([node.wave > 0 for node in tree.nodes] + [False])[ids[0]]
        added = gradient_of(tree, ids[0], torch.where(is_late, values, 0.0), PROBABILITIES, 0)
        for node in tree.nodes:
            before = tree.nodes[node.parent] if node.parent is not None else None
            if node.wave and (before is None or not before.wave):
                state, end = (0, 0) if before is None else (before.token_ids[-1], before.end)
                added = added - exact_gradient(CAP - end, state) / WIDTH
        errors.append(added)
    each = torch.stack(errors)
    deviation = each.std(0) / len(errors) ** 0.5
    assert (each.mean(0) / deviation)[deviation > 0].abs().max() < 4.5


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


# Without chance: every tree, with its probability


@pytest.mark.parametrize("estimator", ["leave_one_out", "optimal_baseline"])
@pytest.mark.parametrize("fallback", ["none", "root"])
@pytest.mark.parametrize("first_width", [1.0, 2.5])
def test_the_mean_over_every_tree_is_the_gradient(first_width: float, fallback: str, estimator: str) -> None:
    """
    The first segments too, where one path would be wide enough: a prompt has two children, so each has another.

    A leaf of a fallback to the prompt brings 1 / W of the gradient on top.
    """
    shape = {"max_completion_length": 2, "segment_length": 1, "branch_schedule": "sqrt", "fallback_policy": fallback}
    config = make_config(4, **shape)
    trees, chances = every_tree(config, 0, widths=[first_width, 4.0])
    assert chances.sum().item() == pytest.approx(1)
    num_late = sum(
        chance * sum(node.wave > 0 for node in tree.nodes if node.depth == 0)
        for tree, chance in zip(trees, chances.tolist(), strict=True)
    )
    assert (num_late > 0) == (fallback == "root")
    mean = torch.einsum("t,tij->ij", chances, estimated_gradients(trees, estimator, "inverse_branching"))
    torch.testing.assert_close(mean, exact_gradient(2) * (1 + num_late / 4))
