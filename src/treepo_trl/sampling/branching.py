"""
How many children each live path of a tree gets, and where a fallback cuts.

Algorithm 1 of [TreePO](https://huggingface.co/papers/2508.17445), section 2.2, as pure functions over plain numbers.
Whatever draws takes an explicit `random.Random`. Standard library only.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from .tree import SegmentNode, SegmentTree
from .widths import square_root_widths


BranchingPolicy = Literal["uniform", "low_prob", "high_prob", "entropy"]
BranchSchedule = Literal["early", "spread", "sqrt"]
FallbackPolicy = Literal["random", "low_prob", "root", "none"]
FallbackCandidates = Literal["finished", "finished_first", "all"]


def draw_initial_branching(initial_branching_factor: Sequence[int], num_generations: int, rng: random.Random) -> int:
    """
    Number of children of the prompt, drawn uniformly from `[low, high]` for this prompt.

    The paper's "more initial divergence" draws from 2 to 8 (section 3.1). Never more than `num_generations`.
    """
    low, high = initial_branching_factor
    return min(rng.randint(low, high), num_generations)


def level_budget(
    num_live: int, num_finished: int, num_finished_now: int, num_generations: int, branching_factor: int
) -> int:
    """
    Segments that the next level of a tree may hold: `max(min(W - F, N * (f + A)), A)`.

    Budget transfer (section 2.2): the share of paths that finished in this level moves to the live ones, and every
    live path goes on. Together with the finished paths the result never exceeds `num_generations`.

    Args:
        num_live (`int`):
            Live paths A of the tree, at least 1.
        num_finished (`int`):
            Finished paths F of the tree, those of this level included.
        num_finished_now (`int`):
            Paths f that finished in this level.
        num_generations (`int`):
            Tree width W.
        branching_factor (`int`):
            Children N per path of a full level.
    """
    return max(min(num_generations - num_finished, branching_factor * (num_finished_now + num_live)), num_live)


def spread_width(end: int, expected_length: int, num_generations: int) -> int:
    """
    Paths that a tree should have open in a level that ends at token `end` under the `spread` schedule: `W ** (e / E)`.

    The width grows by a constant factor per token, so the branching points lie evenly over the expected length and it
    reaches `num_generations` with the last segment.
    """
    return math.ceil(num_generations ** min(end / expected_length, 1.0) - 1e-9)


Widths = Callable[[Sequence[float], Sequence[float], int], list[float]]
"""Paths per unit of leaf weight at each depth, from the same arguments as `square_root_widths`."""


def any_number(_end: int, _expected_length: int, num_generations: int) -> int:
    """Paths in a level that only `branching_factor` limits."""
    return num_generations


@dataclass(frozen=True)
class Schedule:
    """What one of the `BranchSchedule` says about the widths of a tree."""

    most_open: Callable[[int, int, int], int] = any_number
    """Most paths that are open in a level, from the same arguments as `spread_width`."""
    widths: Widths | None = None
    """Widths by depth in place of `branching_factor`, in training from what the batches before have shown."""


SCHEDULES: dict[BranchSchedule, Schedule] = {
    "early": Schedule(),
    "spread": Schedule(most_open=spread_width),
    "sqrt": Schedule(widths=square_root_widths),
}


def split_budget(total: int, scores: Sequence[float], rng: random.Random, temperature: float = 1.0) -> list[int]:
    """
    Children per live path: everyone gets one, the rest goes by score.

    Args:
        total (`int`):
            Segments to hand out, at least the number of paths.
        scores (sequence of `float`):
            One per path: the part beyond one child each is split in proportion to `softmax(scores / temperature)`,
            rounded by largest remainder.
        rng (`random.Random`):
            Chooses among paths with the same remainder.
        temperature (`float`):
            Softmax temperature, larger is more even.

    Returns:
        `list[int]`: one count per path, each at least 1, that sum to `total`.
    """
    spare = total - len(scores)
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    scale = spare / sum(weights)
    exact = [weight * scale for weight in weights]
    counts = [1 + math.floor(x) for x in exact]
    ties = [rng.random() for _ in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (math.floor(exact[i]) - exact[i], ties[i]))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _mean_logprob(node: SegmentNode) -> float:
    if not node.logprobs:
        raise ValueError("The 'low_prob' and 'high_prob' policies need log-probabilities from the engine.")
    return sum(node.logprobs) / len(node.logprobs)


def _entropy(node: SegmentNode) -> float:
    if node.entropy is None:
        raise ValueError("branching_policy='entropy' needs entropies from the engine: build it to report them.")
    return node.entropy


BRANCHING_SCORES: dict[BranchingPolicy, Callable[[SegmentNode], float] | None] = {
    "uniform": None,
    "low_prob": lambda node: -_mean_logprob(node),
    "high_prob": _mean_logprob,
    "entropy": _entropy,
}
"""
Score of a path by its last segment; the paths with the larger scores get more children. `None` goes by weight alone.

`low_prob` and `high_prob` are those of section 4.4. `entropy` is the mean entropy of the distributions that the tokens
were drawn from. It is the "local uncertainty" that the abstract names; the log-probability of one drawn token is only
a sample of it.
"""


def branching_scores(policy: BranchingPolicy, segments: Sequence[SegmentNode]) -> list[float] | None:
    """
    Argument for `split_budget`: a score from each path's last segment; `None` where the heaviest path goes first.

    Raises:
        ValueError: if a segment lacks what the policy reads.
    """
    score = BRANCHING_SCORES[policy]
    return None if score is None else [score(node) for node in segments]


def annealed(start: float, end: float | None, progress: float) -> float:
    """
    Value between `start` and `end` along half a cosine, as `progress` goes from 0 to 1; `start` without an `end`.

    Section 4.4's schedule of the branching temperature: slow at both ends.
    """
    if end is None:
        return start
    return end + (start - end) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2.0


def fallback_stems(
    tree: SegmentTree,
    num_missing: int,
    branching_factor: int,
    policy: FallbackPolicy,
    rng: random.Random,
    candidates: FallbackCandidates = "finished",
) -> list[int | None]:
    """
    Node ids to grow again from when no path of a tree is live and leaves are missing.

    Section 2.2: finished paths are drawn in random order, each is cut at a segment boundary of the tree and gets up to
    `branching_factor` new children until `num_missing` are placed.

    Args:
        tree (`SegmentTree`):
            Tree without live paths and with at least one leaf.
        num_missing (`int`):
            Leaves to add.
        branching_factor (`int`):
            Children per stem.
        policy (`str`):
            `random` cuts at a boundary drawn uniformly, the root included; `low_prob` in front of the segment with the
            lowest mean log-probability; `root` starts again from the prompt; `none` gives no stems.
        rng (`random.Random`):
            Source of every draw.
        candidates (`str`):
            Paths that may be cut. `finished`: those that ended by EOS or by the stop pattern, and the prompt when
            there is none, which is the paper's rule; `finished_first`: all others when there is none; `all`.

    Returns:
        `list[int | None]`: one parent per new segment, `None` for the prompt; `num_missing` of them, or none under
        policy `none`.
    """
    if policy == "none":
        return []
    paths = _candidate_paths(tree, candidates)
    if policy == "root" or not paths:
        return [None] * num_missing
    stems: list[int | None] = []
    while len(stems) < num_missing:
        rng.shuffle(paths)
        for leaf in paths:
            path = tree.path(leaf)
            cuts = [i for i, node in enumerate(path) if tree.nodes[node].is_sampled]  # never between call and answer
            if policy == "random":
                cut = cuts[rng.randrange(len(cuts))]
            elif policy == "low_prob":
                cut = min(cuts, key=lambda i: _mean_logprob(tree.nodes[path[i]]))
            else:
                assert_never(policy)
            stem = path[cut - 1] if cut > 0 else None
            stems.extend([stem] * min(branching_factor, num_missing - len(stems)))
    return stems


def _candidate_paths(tree: SegmentTree, candidates: FallbackCandidates) -> list[int]:
    finished = [leaf for leaf in tree.leaves if tree.nodes[leaf].finish_reason in ("stop", "pattern")]
    if candidates == "finished":
        return finished
    if candidates == "finished_first":
        return finished or list(tree.leaves)
    if candidates == "all":
        return list(tree.leaves)
    assert_never(candidates)
