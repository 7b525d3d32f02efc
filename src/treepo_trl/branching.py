"""
How many children each live path of a tree gets, and where a fallback cuts.

Algorithm 1 of [TreePO](https://huggingface.co/papers/2508.17445), section 2.2, as pure functions over plain numbers.
Whatever draws takes an explicit `random.Random`. Standard library only.
"""

import math
import random
from collections.abc import Sequence
from typing import Literal

from .tree import SegmentTree


BranchingPolicy = Literal["uniform", "low_prob", "high_prob"]
BranchSchedule = Literal["early", "spread"]
FallbackPolicy = Literal["random", "low_prob", "root", "none"]


def draw_initial_branching(
    initial_branching_factor: int | Sequence[int], num_generations: int, rng: random.Random
) -> int:
    """
    Number of children of the prompt: the given number, or one drawn uniformly from `[low, high]` for this prompt.

    The paper's "more initial divergence" draws from 2 to 8 (section 3.1). Never more than `num_generations`.
    """
    if isinstance(initial_branching_factor, int):
        return min(initial_branching_factor, num_generations)
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


def spread_width(depth: int, max_tree_depth: int, num_generations: int) -> int:
    """
    Paths that a tree should have opened by the segments of `depth` under the `spread` schedule: `W ** ((d+1)/D)`.

    The width grows by a constant factor per level, so the branching points lie evenly over the length and it reaches
    `num_generations` with the last segment.
    """
    fraction = min((depth + 1) / max_tree_depth, 1.0)
    return math.ceil(num_generations**fraction - 1e-9)


def split_budget(total: int, scores: Sequence[float] | int, rng: random.Random, temperature: float = 1.0) -> list[int]:
    """
    Children per live path: everyone gets one, the rest goes evenly or by score.

    Args:
        total (`int`):
            Segments to hand out, at least the number of paths.
        scores (`int` or sequence of `float`):
            Number of paths for an even split, whose remainder goes to randomly chosen paths (the released code gives
            it all to the last path). Or one score per path: the part beyond one child each is split in proportion to
            `softmax(scores / temperature)`, rounded by largest remainder.
        rng (`random.Random`):
            Chooses who gets the remainder.
        temperature (`float`):
            Softmax temperature, larger is more even.

    Returns:
        `list[int]`: one count per path, each at least 1, that sum to `total`.
    """
    if isinstance(scores, int):
        share, remainder = divmod(total, scores)
        counts = [share] * scores
        for i in rng.sample(range(scores), remainder):
            counts[i] += 1
        return counts
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


def branching_scores(policy: BranchingPolicy, segment_logprobs: Sequence[Sequence[float]]) -> Sequence[float] | int:
    """
    Argument for `split_budget`: the paths' count for `uniform`, else a score from each path's last segment.

    The score is the mean log-probability of the last segment's tokens (section 4.4), negated for `low_prob`.
    """
    if policy == "uniform":
        return len(segment_logprobs)
    sign = 1.0 if policy == "high_prob" else -1.0
    return [sign * sum(logprobs) / len(logprobs) for logprobs in segment_logprobs]


def fallback_stems(
    tree: SegmentTree, num_missing: int, branching_factor: int, policy: FallbackPolicy, rng: random.Random
) -> list[int | None]:
    """
    Node ids to grow again from when no path of a tree is live and leaves are missing.

    Section 2.2: finished paths are drawn in random order, each is cut at a segment boundary of the tree and gets up to
    `branching_factor` new children until `num_missing` are placed. Paths that ended by EOS or by the stop pattern come
    first; the others (repetition, length) only serve when there is none of those.

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

    Returns:
        `list[int | None]`: one parent per new segment, `None` for the prompt; `num_missing` of them, or none under
        policy `none`.
    """
    if policy == "none":
        return []
    if policy == "root":
        return [None] * num_missing
    candidates = [leaf for leaf in tree.leaves if tree.nodes[leaf].finish_reason in ("stop", "pattern")]
    candidates = candidates or list(tree.leaves)
    stems: list[int | None] = []
    while len(stems) < num_missing:
        rng.shuffle(candidates)
        for leaf in candidates:
            path = tree.path(leaf)
            if policy == "random":
                cut = rng.randrange(len(path))
            else:
                cut = min(range(len(path)), key=lambda i: _mean(tree.nodes[path[i]].logprobs))
            stem = path[cut - 1] if cut > 0 else None
            stems.extend([stem] * min(branching_factor, num_missing - len(stems)))
    return stems


def _mean(values: list[float] | None) -> float:
    if not values:
        raise ValueError("fallback_policy='low_prob' needs log-probabilities from the engine.")
    return sum(values) / len(values)
