"""
How good tree estimators of the policy gradient are, on a Markov chain whose gradient is known.

    python benchmarks/estimators.py            # table of docs/method.md; 2 cores: 4 minutes
    python benchmarks/estimators.py --cost     # seconds of `tree_advantages` itself

Columns: "along" is the part of the mean along the exact gradient (1 if exact) and "beside" what the mean has beside
it, over the gradient's length; "noise" is the variance of one tree's estimate over the squared length of its part
along the gradient, times decoded tokens, over the same of independent completions under RLOO: below 1, a decoded token
buys more than it does there. Standard errors of the first two in brackets.
"""

import argparse
import statistics
import time

import torch

from tests.support.markov import estimated_gradient, exact_gradient, sample_trees
from treepo_trl.sampling.tree import SegmentTree
from treepo_trl.update.advantages import expand_to_tokens, leaf_paths, tree_advantages


ESTIMATORS = (
    "grpo",
    "treepo",
    "treepo_size_weighted",
    "treepo_segment",
    "value_difference",
    "treerl",
    "leave_one_out",
)


def quality(trees: list[SegmentTree], estimator: str, weighting: str, cap: int) -> tuple[float, float, float, float]:
    """Part along and beside the exact gradient, standard error of both, and noise times decoded tokens."""
    exact = exact_gradient(cap)
    estimates = torch.stack([estimated_gradient(tree, estimator, weighting) for tree in trees])
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
    print("| schedule | leaf weighting | estimator | along | beside | noise per decoded token |")
    print("|---|---|---|---|---|---|")
    print(f"| independent | - | RLOO | {along:.3f} ({error:.3f}) | {beside:.3f} ({error:.3f}) | 1.00 |")
    for schedule in ("early", "spread"):
        trees = sample_trees(num_trees, width, cap, branch_schedule=schedule)
        for weighting in ("uniform", "inverse_branching"):
            for estimator in ESTIMATORS:
                along, beside, error, noise = quality(trees, estimator, weighting, cap)
                cells = f"{along:.3f} ({error:.3f}) | {beside:.3f} ({error:.3f}) | {noise / reference:.2f}"
                print(f"| {schedule} | `{weighting}` | `{estimator}` | {cells} |", flush=True)


def print_cost(num_trees: int, width: int, depth: int, repeats: int) -> None:
    """Milliseconds of each estimator on many trees at once, and of what surrounds it in the trainer."""
    trees = []
    for _ in range(num_trees):
        tree = SegmentTree([1])
        paths: list[int | None] = [None]
        for _ in range(depth):
            paths = [tree.add(parent, [1] * 8) for parent in paths for _child in range(2 if len(paths) < width else 1)]
        for leaf in paths:
            tree.finish(leaf, "length")
        trees.append(tree)
    rewards = torch.randint(2, (num_trees, width), generator=torch.Generator().manual_seed(0)).float()

    def milliseconds(function: object) -> float:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    ids, lengths = leaf_paths(trees)
    print(f"{num_trees} trees of {width} leaves and depth {depth}, {torch.get_num_threads()} threads\n")
    print("| what | ms |")
    print("|---|---|")
    for estimator in ESTIMATORS:
        print(f"| `{estimator}` | {milliseconds(lambda e=estimator: tree_advantages(rewards, ids, e)):.1f} |")
    rejection = milliseconds(lambda: tree_advantages(rewards, ids, "treepo", subgroup_rejection=True))
    print(f"| `treepo` with subgroup rejection | {rejection:.1f} |")
    advantages = tree_advantages(rewards, ids, "treepo")
    print(f"| paths of the leaves | {milliseconds(lambda: leaf_paths(trees)):.1f} |")
    spread = milliseconds(lambda: expand_to_tokens(advantages, lengths, 8 * depth))
    print(f"| values of segments to {8 * depth} tokens | {spread:.1f} |")


def main() -> None:
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
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
