"""Prompts of six decisions with shared weights, and trees of them: what the learning proxies learn on."""

import math
from dataclasses import dataclass

import numpy as np


Array = np.ndarray

LEVELS, OPTIONS, PROMPTS, CONTEXTS, WEIGHTS, SKILLS, OTHERS = 6, 4, 600, 100, 200, 48, 600
SURE, UNSURE = 2, 8
"""Decisions that do not matter, per level: on a right path, and on one that went wrong."""
FAMILIES = {
    "early": [0.9, 0.9, 3.6, 3.6, 3.6, 3.6],
    "even": [2.3] * LEVELS,
    "late": [3.6, 3.6, 3.6, 3.6, 0.9, 0.9],
}
"""How much likelier the right option is at first, by level: a task is decided where that is little."""
POPULATIONS = {"hopeless": (0.3, 0.5), "middle": (2.0, 2.0), "solved": (0.5, 0.2)}
"""Parameters of the beta distributions that the first pass rates of prompts come from."""


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class World:
    """Prompts and the features of their options, drawn from a seed; their first pass rates from a population."""

    def __init__(self, family: str, seed: int, population: str | None = None) -> None:
        rng = np.random.default_rng(1000 + seed)

        def directions(*shape: int) -> Array:
            x = rng.normal(size=shape)
            return x / np.linalg.norm(x, axis=-1, keepdims=True)

        self.features = 0.6 * directions(LEVELS, CONTEXTS, OPTIONS, WEIGHTS)
        self.features[:, :, 0] += 0.8 * directions(SKILLS, WEIGHTS)[rng.integers(0, SKILLS, (LEVELS, CONTEXTS))]
        self.other_features = directions(OTHERS, OPTIONS, WEIGHTS)
        self.bias = np.zeros((LEVELS, CONTEXTS, OPTIONS))
        self.bias[:, :, 0] = np.array(FAMILIES[family])[:, None] + rng.normal(0, 1.2, (LEVELS, CONTEXTS))
        self.other_bias = rng.normal(0, 1, (OTHERS, OPTIONS))
        self.contexts = rng.integers(0, CONTEXTS, (PROMPTS, LEVELS))
        self.others = rng.integers(0, OTHERS, (PROMPTS, LEVELS, UNSURE))
        self.difficulty_noise = rng.normal(0, 0.7, PROMPTS)
        self.ease = np.zeros(PROMPTS)
        if population is not None:
            self._ease_to(rng.beta(*POPULATIONS[population], PROMPTS).clip(1e-4, 1 - 1e-4))

    def policy(self, weights: Array) -> tuple[Array, Array]:
        """Probabilities `(LEVELS, CONTEXTS, OPTIONS)` of the decisions and `(OTHERS, OPTIONS)` of the others."""
        return softmax(self.bias + self.features @ weights), softmax(self.other_bias + self.other_features @ weights)

    def right(self, probabilities: Array) -> Array:
        """`(PROMPTS, LEVELS)`: probability of each right decision."""
        p = probabilities[np.arange(LEVELS), self.contexts, 0]
        return p / (p + (1 - p) * np.exp(-self.ease)[:, None])

    def decision(self, probabilities: Array, prompts: Array, depth: int) -> Array:
        """`(T, OPTIONS)`: probabilities of the options of T prompts at a depth."""
        p = probabilities[depth, self.contexts[prompts, depth]]
        p[:, 0] *= np.exp(self.ease[prompts])
        return p / p.sum(1, keepdims=True)

    def _ease_to(self, rates: Array) -> None:
        """Make every right option of a prompt likelier by what gives the prompt its rate, found by bisection."""
        low, high = np.full(PROMPTS, -30.0), np.full(PROMPTS, 30.0)
        start = self.policy(np.zeros(WEIGHTS))[0]
        for _ in range(50):
            self.ease = (low + high) / 2
            is_low = self.right(start).prod(1) < rates
            low, high = np.where(is_low, self.ease, low), np.where(is_low, high, self.ease)


@dataclass
class Level:
    """The nodes of one level in T trees: N in each."""

    parent: Array
    """`(T, N)`: index in the level above."""
    weight: Array
    """`(T, N)`: product of 1/children along the path."""
    option: Array
    others: Array
    """`(T, N, UNSURE)`: options of the decisions that do not matter."""
    is_taken: Array
    """`(T, N, UNSURE)` bool: which of these there were."""
    score: Array
    """`(T, N)`: sum of 1 - p over the decisions of the node."""
    is_right: Array
    """`(T, N)` bool: whether all decisions so far are right."""


def up(values: Array, parent: Array, num_parents: int) -> Array:
    """Sum `(T, N)` over the children of each of `num_parents` nodes."""
    rows = np.arange(len(values))[:, None] * num_parents
    return np.bincount((rows + parent).ravel(), values.ravel(), len(values) * num_parents).reshape(len(values), -1)


def split(weight: Array, total: int, heaviest: bool, rng: np.random.Generator) -> Array:
    """Children of each path of T trees, `total` in each tree: the heaviest first, or evenly."""
    counts = np.ones(weight.shape, int)
    ties = 1e-9 * rng.random(weight.shape)
    for _ in range(total - weight.shape[1]):
        keys = weight / np.sqrt(counts * (counts + 1.0)) if heaviest else 1.0 / counts
        counts[np.arange(len(counts)), (keys + ties).argmax(1)] += 1
    return counts


def grow(
    world: World,
    policy: tuple[Array, Array],
    prompts: Array,
    widths: list[int],
    heaviest: bool,
    rng: np.random.Generator,
    start: int = 0,
) -> list[Level]:
    """A tree for each of T prompts, below `start` right decisions that are given."""
    levels: list[Level] = []
    weight, is_right = np.ones((len(prompts), 1)), np.ones((len(prompts), 1), bool)
    rows = np.arange(len(prompts))[:, None]
    for depth, width in list(enumerate(widths))[start:]:
        counts = split(weight, max(width, weight.shape[1]), heaviest, rng)
        parent = np.repeat(np.tile(np.arange(weight.shape[1]), len(prompts)), counts.ravel()).reshape(len(prompts), -1)
        weight = weight[rows, parent] / counts[rows, parent]
        p = world.decision(policy[0], prompts, depth)
        option = (rng.random((*parent.shape, 1)) > p.cumsum(-1)[:, None, :-1]).sum(-1)
        is_right = is_right[rows, parent] & (option == 0)
        q = policy[1][world.others[prompts, depth]]
        others = (rng.random((*parent.shape, UNSURE, 1)) > q.cumsum(-1)[:, None, :, :-1]).sum(-1)
        is_taken = np.broadcast_to((np.arange(UNSURE) < SURE), others.shape) | ~is_right[:, :, None]
        missed = 1 - np.take_along_axis(q, others.transpose(0, 2, 1), 2).transpose(0, 2, 1)
        score = 1 - np.take_along_axis(p, option, 1) + (missed * is_taken).sum(-1)
        levels.append(Level(parent, weight, option, others, is_taken, score, is_right))
    return levels


def gradient(
    world: World, policy: tuple[Array, Array], prompts: Array, levels: list[Level], values: list[Array], start: int = 0
) -> Array:
    """Sum over the nodes of their values times the gradient of their log-probabilities."""
    main, other = np.zeros_like(world.bias), np.zeros_like(world.other_bias)
    for depth, (level, value) in enumerate(zip(levels, values, strict=True), start):
        context = world.contexts[prompts, depth]
        np.add.at(main, (depth, context[:, None], level.option), value)
        np.add.at(main, (depth, context), -value.sum(1)[:, None] * world.decision(policy[0], prompts, depth))
        taken = value[:, :, None] * level.is_taken
        which = world.others[prompts, depth]
        np.add.at(other, (which[:, None], level.others), taken)
        np.add.at(other, which, -taken.sum(1)[:, :, None] * policy[1][which])
    return np.tensordot(main, world.features, 3) + np.tensordot(other, world.other_features, 2)


def sums_below(levels: list[Level], leaf_values: Array) -> list[Array]:
    """Sum of `leaf_values` below each node, by level."""
    sums = [leaf_values]
    for above, level in zip(levels[-2::-1], levels[:0:-1], strict=True):
        sums.append(up(sums[-1], level.parent, above.weight.shape[1]))
    return sums[::-1]


def node_values(levels: list[Level], leaf_values: Array) -> list[Array]:
    """Weighted mean of `leaf_values` below each node, by level: the weights of its leaves sum to its own."""
    sums = sums_below(levels, levels[-1].weight * leaf_values)
    return [below / level.weight for below, level in zip(sums, levels, strict=True)]


def resolved_variances(levels: list[Level], values: list[Array]) -> Array:
    """
    `(LEVELS,)`: variance of the value that each level resolves, by nested analysis of variance; else `nan`.

    The sample variance of siblings holds what they resolve, and the noise of their own values: what deeper levels
    resolve, shared by as many paths as there are below them.
    """
    found = np.full(len(levels), np.nan)
    for depth in range(len(levels) - 1, -1, -1):
        level = levels[depth]
        n = 1 if depth == 0 else levels[depth - 1].weight.shape[1]
        counts = up(np.ones_like(level.weight), level.parent, n)
        means = up(values[depth], level.parent, n) / np.maximum(counts, 1)
        rows = np.arange(len(means))[:, None]
        squares = up((values[depth] - means[rows, level.parent]) ** 2, level.parent, n)
        has_siblings = counts > 1
        if not has_siblings.any():
            continue
        sample = (squares[has_siblings] / (counts[has_siblings] - 1)).mean()
        # What the noise of a child's value is: the sum of squared shares of the nodes below it, level by level.
        shares, noise = [np.ones_like(level.weight)], 0.0
        is_counted = has_siblings[rows, level.parent]
        for below in range(depth + 1, len(levels)):
            deeper = levels[below]
            kids = up(np.ones_like(deeper.weight), deeper.parent, levels[below - 1].weight.shape[1])
            shares.append(shares[-1][rows, deeper.parent] / kids[rows, deeper.parent])
            squared = shares[-1] ** 2
            for j in range(below, depth, -1):
                squared = up(squared, levels[j].parent, levels[j - 1].weight.shape[1])
            noise += np.nan_to_num(found[below]) * squared[is_counted].mean()
        found[depth] = max(sample - noise, 0.0)
    return found


def widths_of(rule: str, width: int, variances: Array) -> list[int]:
    """Nodes of each level."""
    shares = np.arange(1, LEVELS + 1) / LEVELS
    if rule == "independent":
        return [width] * LEVELS
    if rule == "early":
        return [min(2 ** (level + 1), width) for level in range(LEVELS)]
    if rule == "spread":
        return [max(1, round(width**share)) for share in shares]
    if rule == "sqrt":
        return [max(min(2, width), round(width * math.sqrt(share))) for share in shares]
    best = non_decreasing(np.maximum(variances, 2e-3) * shares)
    return [max(min(2, width), round(width * x)) for x in np.sqrt(best / best[-1])]


def non_decreasing(values: Array) -> Array:
    """The nearest sequence that never falls (pooling adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append([(a * n + b * m) / (n + m), n + m])
    return np.array([value for value, count in pools for _ in range(int(count))])
