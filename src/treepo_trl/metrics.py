"""
Metrics of a batch of trees.

Totals are sums, so that those of several samplings and processes add up. Metrics are made of them at the end.
"""

from collections import Counter
from typing import cast, get_args

import torch
from accelerate import Accelerator

from .sampling import FinishReason, SamplingStats, SegmentTree
from .sampling.nodes import AnswerReason, TokenReason


def tree_totals(trees: list[SegmentTree], stats: SamplingStats, processes_per_engine: int = 1) -> dict[str, float]:
    """
    Sums over the trees of one process; sums of several processes add up.

    Args:
        trees (`list[SegmentTree]`):
            Trees of the process.
        stats ([`SamplingStats`]):
            Statistics of the call that sampled them.
        processes_per_engine (`int`):
            Processes that share an engine by tensor parallelism: `stats` counts the trees of all of them.
    """
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    reasons = Counter(tree.nodes[leaf].finish_reason for tree, leaf in leaves)
    subgroup_sizes = [size for tree in trees for size in _subgroup_sizes(tree)]
    return {
        "trees": len(trees),
        "leaves": sum(len(tree.leaves) for tree in trees),
        "single_leaves": sum(len(tree.leaves) == 1 for tree in trees),
        "mean_lengths": sum(tree.mean_length() for tree in trees),
        "depth": sum(tree.nodes[leaf].depth + 1 for tree in trees for leaf in tree.leaves),
        **{f"finish_{reason}": reasons[reason] for reason in get_args(FinishReason)},
        "serial_segments": stats.num_serial_segments,
        "longest_path": max((tree.nodes[leaf].depth + 1 for tree, leaf in leaves), default=0),
        "fallback_leaves": stats.num_fallback_leaves / processes_per_engine,
        "decoded_tokens": stats.num_decoded_tokens / processes_per_engine,
        "unique_tokens": sum(tree.num_unique_tokens for tree in trees),
        "leaf_tokens": sum(tree.num_leaf_tokens for tree in trees),
        "subgroups": len(subgroup_sizes),
        "subgroup_sizes": sum(subgroup_sizes),
        "sampler_seconds": stats.seconds - stats.engine_seconds,
        "engine_seconds": stats.engine_seconds,
        "processes": 1,
        "tool_seconds": stats.tool_seconds,
        "executed_calls": sum(node.num_calls for tree in trees for node in tree.nodes),
        "leaf_calls": sum(tree.nodes[node].num_calls for tree, leaf in leaves for node in tree.path(leaf)),
        "turns": sum(tree.nodes[leaf].num_turns + 1 for tree, leaf in leaves),
        "answer_tokens": sum(tree.num_answer_tokens for tree in trees),
    }


def tree_metrics(totals: dict[str, float]) -> dict[str, float]:
    """
    Metrics under `tree/` from totals over all processes.

    Depth in segments per leaf; `mean_length` in tokens, weighted against the tilt of branching; finish reasons and
    fallback as fractions of the leaves; tokens as sums over the batch; `subgroup_size_mean` over the nodes that two or
    more leaves share, in leaves; seconds as means over processes.
    """
    leaves = totals["leaves"]
    metrics = {
        "tree/depth_mean": totals["depth"] / leaves,
        "tree/mean_length": totals["mean_lengths"] / totals["trees"],
    }
    for reason in get_args(TokenReason):
        metrics[f"tree/finish_{reason}_frac"] = totals[f"finish_{reason}"] / leaves
    metrics["tree/fallback_frac"] = totals["fallback_leaves"] / leaves
    metrics["tree/leaves_mean"] = leaves / totals["trees"]
    metrics["tree/single_leaf_frac"] = totals["single_leaves"] / totals["trees"]
    for name in ("serial_segments", "longest_path"):
        metrics[f"tree/{name}"] = totals[name] / totals["processes"]
    for name in ("decoded_tokens", "unique_tokens", "leaf_tokens"):
        metrics[f"tree/{name}"] = totals[name]
    metrics["tree/leaf_unique_ratio"] = totals["leaf_tokens"] / totals["unique_tokens"]
    metrics["tree/subgroup_size_mean"] = totals["subgroup_sizes"] / max(totals["subgroups"], 1)
    for name in ("sampler_seconds", "engine_seconds"):
        metrics[f"tree/{name}"] = totals[name] / totals["processes"]
    return metrics


def turn_metrics(totals: dict[str, float]) -> dict[str, float]:
    """
    Metrics of trees whose turns can call something, from totals over all processes.

    Calls and answer tokens as sums over the batch; `calls_per_executed` in calls on the paths of leaves;
    `turns_mean` per leaf; `tool_seconds` as mean over processes; what environments have cost as sums.
    """
    leaves, executed = totals["leaves"], totals["executed_calls"]
    metrics = {f"tree/finish_{reason}_frac": totals[f"finish_{reason}"] / leaves for reason in get_args(AnswerReason)}
    metrics["tree/tool_calls"] = executed
    metrics["tree/calls_per_executed"] = totals["leaf_calls"] / max(executed, 1)
    metrics["tree/turns_mean"] = totals["turns"] / leaves
    metrics["tree/answer_tokens"] = totals["answer_tokens"]
    metrics["tree/tool_seconds"] = totals["tool_seconds"] / totals["processes"]
    for name in ("resets", "forks", "replayed_calls"):
        if f"environment_{name}" in totals:
            metrics[f"environment/{name}"] = totals[f"environment_{name}"]
    return metrics


def add_totals(samplings: list[dict[str, float]]) -> dict[str, float]:
    """Totals of one process's samplings together."""
    return {name: sum(totals[name] for totals in samplings) for name in samplings[0]} | {"processes": 1}


def reduce_totals(totals: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Totals summed over processes."""
    return dict(zip(totals, sum_over_processes(list(totals.values()), accelerator), strict=True))


def sum_over_processes(values: list[float], accelerator: Accelerator) -> list[float]:
    """The sum over processes of each value; every process has as many."""
    own = torch.tensor([values], dtype=torch.float32, device=accelerator.device)
    return cast(torch.Tensor, accelerator.gather(own)).sum(0).tolist()


def _subgroup_sizes(tree: SegmentTree) -> list[int]:
    """Leaves below each node that has at least two."""
    sizes = Counter(node for leaf in tree.leaves for node in tree.path(leaf))
    return [size for size in sizes.values() if size > 1]
