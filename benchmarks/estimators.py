"""
How good tree estimators of the policy gradient are, on a Markov chain whose gradient is known.

    python -m benchmarks.estimators            # all estimators; 4 minutes on 2 cores
    python -m benchmarks.estimators --cost     # seconds of `tree_advantages` itself

Prints a Markdown table with these columns:

- "along": the part of the mean estimate along the exact gradient, in units of the gradient's length; 1 if exact.
- "beside": the length of the rest of the mean estimate, in the same units; 0 if exact.
- "noise per decoded token": the variance of one tree's estimate over the squared length of its part along the
  gradient, times the tokens decoded for it. The unit is the same product for independent completions under RLOO. Below
  1, a decoded token buys more than it does there.

The first two have their standard errors in brackets.
"""

import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch

from benchmarks.common import make_parser, table_head, table_row
from tests.support.markov import estimated_gradients, exact_gradient, sample_trees
from treepo_trl.sampling.tree import SegmentTree
from treepo_trl.update.advantages import AdvantageEstimator, expand_to_tokens, leaf_paths, tree_advantages


ESTIMATORS: tuple[AdvantageEstimator, ...] = get_args(AdvantageEstimator)


def quality(trees: list[SegmentTree], estimator: str, weighting: str, cap: int) -> tuple[float, float, float, float]:
    """Part along and beside the exact gradient, standard error of both, and noise times decoded tokens."""
    exact = exact_gradient(cap)
    estimates = estimated_gradients(trees, estimator, weighting)
    mean = estimates.mean(0)
    along = ((mean * exact).sum() / (exact * exact).sum()).item()
    beside = ((mean - along * exact).norm() / exact.norm()).item()
    variance = (estimates - mean).pow(2).sum((1, 2)).mean().item()
    error = (variance / len(trees)) ** 0.5 / exact.norm().item()
    tokens = statistics.mean(tree.num_unique_tokens for tree in trees)
    return along, beside, error, variance / (along * exact.norm().item()) ** 2 * tokens


def print_quality(num_trees: int, width: int, cap: int) -> None:
    """The table of all estimators, schedules and weightings."""
    independent = sample_trees(num_trees, width, cap, branching_factor=1)
    along, beside, error, reference = quality(independent, "leave_one_out", "uniform", cap)
    print(f"{num_trees} trees of {width} leaves, at most {cap} tokens, no fallback\n")
    print(table_head("schedule", "leaf weighting", "estimator", "along", "beside", "noise per decoded token"))
    print(table_row("independent", "-", "RLOO", f"{along:.3f} ({error:.3f})", f"{beside:.3f} ({error:.3f})", "1.00"))
    for schedule in ("early", "spread", "sqrt"):
        expected = cap // 2 if schedule == "sqrt" else None
        trees = sample_trees(num_trees, width, cap, branch_schedule=schedule, expected_completion_length=expected)
        for weighting in ("uniform", "inverse_branching"):
            for estimator in ESTIMATORS:
                along, beside, error, noise = quality(trees, estimator, weighting, cap)
                cells = f"{along:.3f} ({error:.3f})", f"{beside:.3f} ({error:.3f})", f"{noise / reference:.2f}"
                print(table_row(schedule, f"`{weighting}`", f"`{estimator}`", *cells), flush=True)


def doubling_tree(width: int, depth: int) -> SegmentTree:
    """A tree whose paths double until there are `width`, with `depth` segments of 8 tokens on each."""
    tree = SegmentTree([1])
    ends: list[int | None] = [None]
    for _ in range(depth):
        children = 2 if len(ends) < width else 1
        ends = [tree.add(parent, [1] * 8) for parent in ends for _ in range(children)]
    for leaf in ends:
        if leaf is not None:
            tree.finish(leaf, "length")
    return tree


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def print_cost(num_trees: int, width: int, depth: int, repeats: int) -> None:
    """Milliseconds of each estimator on many trees at once, and of what surrounds it in the trainer."""
    trees = [doubling_tree(width, depth) for _ in range(num_trees)]
    rewards = torch.randint(2, (num_trees, width), generator=torch.Generator().manual_seed(0)).float()
    ids, lengths = leaf_paths(trees)
    advantages = tree_advantages(rewards, ids, "treepo")
    calls: dict[str, Callable[[], object]] = {
        f"`{name}`": lambda name=name: tree_advantages(rewards, ids, name) for name in ESTIMATORS
    }
    calls["`treepo` with subgroup rejection"] = lambda: tree_advantages(
        rewards, ids, "treepo", subgroup_rejection=True
    )
    calls["paths of the leaves"] = lambda: leaf_paths(trees)
    calls[f"values of segments to {8 * depth} tokens"] = lambda: expand_to_tokens(advantages, lengths, 8 * depth)
    print(f"{num_trees} trees of {width} leaves and depth {depth}, {torch.get_num_threads()} threads\n")
    print(table_head("what", "ms"))
    for name, call in calls.items():
        print(table_row(name, f"{milliseconds(call, repeats):.1f}"))


def main() -> None:
    """Print the table that was asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--trees", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--cap", type=int, default=12)
    parser.add_argument("--cost", action="store_true", help="time `tree_advantages` on 1024 trees of 16 leaves")
    args = parser.parse_args()
    if args.cost:
        print_cost(1024, 16, 32, repeats=9)
    else:
        print_quality(args.trees, args.width, args.cap)


if __name__ == "__main__":
    main()
