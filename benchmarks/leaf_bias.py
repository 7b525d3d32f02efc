"""
How far the leaves of trees are from independent completions, with and without `leaf_weights`.

    python -m benchmarks.leaf_bias

A Markov chain with known expectations (`MarkovEngine` in `tests/support/fakes.py`) takes the place of a model. The
Markdown table has a row for each schedule and fallback. It shows two means over leaves, plain and weighted, with
standard errors over trees: of the length in tokens, and of a reward that depends on how a completion ends. The exact
values stand above it.
"""

import statistics
from typing import get_args

from benchmarks.common import make_parser, table_head, table_row
from tests.support.fakes import EOS, MarkovEngine
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.sampling.branching import BranchSchedule, FallbackPolicy


STATISTICS = ("length", "from_three")


def estimate(
    num_trees: int, width: int, cap: int, schedule: BranchSchedule, fallback: FallbackPolicy
) -> dict[str, tuple[float, float]]:
    """Mean and standard error over trees of each statistic, plain and weighted; and the share of fallback leaves."""
    config = TreeSamplingConfig(
        num_generations=width,
        segment_length=4,
        max_completion_length=cap,
        stop_repetition=False,
        branch_schedule=schedule,
        fallback_policy=fallback,
    )
    sampler = TreeSampler(MarkovEngine(1), config, [EOS])
    values: dict[str, list[float]] = {f"{kind} {name}": [] for name in STATISTICS for kind in ("plain", "weighted")}
    for tree in sampler.sample([[9]] * num_trees, seed=0):
        observed = [MarkovEngine.observed(tree.completion_ids(leaf)) for leaf in tree.leaves]
        for name in STATISTICS:
            values[f"plain {name}"].append(statistics.mean(each[name] for each in observed))
            pairs = zip(tree.leaf_weights(), observed, strict=True)
            values[f"weighted {name}"].append(sum(weight * each[name] for weight, each in pairs))
    result = {name: (statistics.mean(v), statistics.stdev(v) / len(v) ** 0.5) for name, v in values.items()}
    result["fallback"] = (sampler.stats.num_fallback_leaves / num_trees / width, 0.0)
    return result


def main() -> None:
    """Estimate and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--trees", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--cap", type=int, default=40)
    args = parser.parse_args()
    exact = MarkovEngine.exact(args.cap)
    print(f"Exact: length {exact['length']:.3f}, reward {exact['from_three']:.4f}; {args.width} leaves\n")
    names = "schedule", "fallback", "fallback leaves", "length, plain", "weighted", "reward, plain", "weighted"
    print(table_head(*names))
    for schedule in get_args(BranchSchedule):
        for fallback in ("none", "random", "low_prob", "root"):
            result = estimate(args.trees, args.width, args.cap, schedule, fallback)
            cells = [
                f"{result[f'{kind} {name}'][0]:.{digits}f} ± {result[f'{kind} {name}'][1]:.{digits}f}"
                for name, digits in (("length", 2), ("from_three", 4))
                for kind in ("plain", "weighted")
            ]
            print(table_row(schedule, fallback, f"{result['fallback'][0]:.0%}", *cells))


if __name__ == "__main__":
    main()
