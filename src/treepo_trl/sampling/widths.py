"""
How many paths a tree has open at each depth, and which of them branches first, for the least noise per decoded token.

Take a tree that has `n_l` paths open at depth `l` per unit of leaf weight. Its segments resolve the variance `v_l`:
that of a child's value given its parent, over all paths. A path has decoded `S_l` tokens up to there, `c_l` of them at
this depth. With a baseline that knows the value of a prefix, the gradient's noise is

    noise = sum_l v_l S_l / n_l    at a price of    sum_l c_l n_l    tokens,

because the norm of a token's score is about the same everywhere. The least product of the two has
`n_l ~ sqrt(v_l S_l / c_l)`: the splitting of particle transport (Kahn and Harris 1951). Where nothing is known of the
task, `v` is in proportion to `c`, and the widths are the square root of the length. Widths from a measured `v` were no
better (`docs/research/baselines-on-a-tiny-policy.md`).

A child's weight is that of its parent over the number of children. A width that is decided before the children are
seen leaves the weighted mean exact. Standard library only.
"""

import heapq
import math
import random
from collections.abc import Sequence
from itertools import accumulate


def heaviest_first(weights: Sequence[float], total: int, rng: random.Random) -> list[int]:
    """
    Children of each live path: one each, and every further one where it takes most noise away.

    Of a path with weight `w` and `k` children the noise is `w ** 2 / k`, so a further child takes
    `w ** 2 / (k * (k + 1))` from it.

    Args:
        weights (sequence of `float`):
            Weight of each path; or weight times the standard deviation of what its next segment resolves, per square
            root of token, where that is known.
        total (`int`):
            Children to hand out, at least one for each path.
        rng (`random.Random`):
            Chooses among paths that are alike.

    Returns:
        `list[int]`: one count per path, each at least 1, that sum to `total`.
    """
    counts = [1] * len(weights)
    heap = [(-(weight**2) / 2, rng.random(), i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    for _ in range(total - len(weights)):
        _, tie, i = heap[0]
        counts[i] += 1
        heapq.heapreplace(heap, (-(weights[i] ** 2) / (counts[i] * (counts[i] + 1)), tie, i))
    return counts


def square_root_widths(tokens: Sequence[float], alive: Sequence[float], num_generations: int) -> list[float]:
    """
    Paths per unit of leaf weight at each depth: `n_l ~ sqrt(S_l)`, scaled to `num_generations` leaves in the mean.

    Args:
        tokens (sequence of `float`):
            c: tokens of a path at each depth, over all paths.
        alive (sequence of `float`):
            Share of the weight whose paths have a segment at each depth, never rising; the first is 1.
        num_generations (`int`):
            W: leaves of a tree.
    """
    lengths = accumulate(c / a if a > 0 else 0.0 for c, a in zip(tokens, alive, strict=True))  # S
    shape = [math.sqrt(length) for length in lengths]
    num_ending = [a - b for a, b in zip(alive, [*alive[1:], 0.0], strict=True)]
    mean = sum(n * share for n, share in zip(shape, num_ending, strict=True))
    if mean <= 0:  # no tokens anywhere: nothing to choose by
        return [float(num_generations)] * len(shape)
    return [n * num_generations / mean for n in shape]
