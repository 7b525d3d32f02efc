"""
Which sampling and which baseline learn most per decoded token, on a policy small enough to judge a rule in minutes.

    python -m benchmarks.learning_proxy                       # every arm; about an hour on 2 cores
    python -m benchmarks.learning_proxy --arms "grpo 16" "measured 8 value" --families even

A prompt is a row of six decisions, and the reward is 1 if all of them are right. Decisions share 200 weights, so a
step learns from one prompt for others and is noisy as on a real model: right and wrong options differ along
directions that many prompts share, and along random ones. Beside each decision lie others that do not matter; a path
that went wrong has four times as many, since a model is unsure where it errs.

Every arm takes steps of the same number of tokens, with Adam, at its best learning rate of a grid. Prints the tokens
to a target reward over those of the first arm, the worst seed, and the lowest entropy that any seed came to.
"""

import argparse
import itertools
import math
import multiprocessing
import multiprocessing.pool
from dataclasses import dataclass, field

import numpy as np

from benchmarks.common import make_parser, table_head, table_row
from benchmarks.decisions import (
    FAMILIES,
    LEVELS,
    PROMPTS,
    WEIGHTS,
    Array,
    Level,
    World,
    gradient,
    grow,
    node_values,
    resolved_variances,
    sums_below,
    widths_of,
)


# What is learned from the batches


@dataclass
class Regression:
    """Least squares over past batches, which counts less the older it is, and starts from `start`."""

    start: Array
    strength: float
    decay: float = 0.97
    _xx: Array | None = None
    _xy: Array | None = None

    def add(self, x: Array, y: Array, weight: Array) -> None:
        """Observations `(N, F)`, `(N,)` and what they count, with a mean of 1."""
        weight = weight / max(weight.mean(), 1e-12)
        xx, xy = (x * weight[:, None]).T @ x, (x * weight[:, None]).T @ y
        self._xx = xx if self._xx is None else self.decay * self._xx + xx
        self._xy = xy if self._xy is None else self.decay * self._xy + xy

    def coefficients(self) -> Array:
        """`(F,)`."""
        if self._xx is None or self._xy is None:
            return self.start
        ridge = self.strength * np.eye(len(self.start))
        return np.linalg.solve(self._xx + ridge, self._xy + ridge @ self.start)


@dataclass
class Learner:
    """What an arm knows from its earlier batches."""

    rate: Array = field(default_factory=lambda: np.zeros(PROMPTS))
    evidence: Array = field(default_factory=lambda: np.zeros(PROMPTS))
    mean_rate: float = 0.1
    variances: Array = field(default_factory=lambda: np.full(LEVELS, 0.05))
    baseline: Regression | None = None
    value: Regression = field(default_factory=lambda: Regression(np.zeros(4 * LEVELS), 1.0, 0.95))

    def past(self, prompts: Array) -> Array:
        """`(T,)`: pass rate of the prompts in earlier steps, shrunk to that of all."""
        return (self.rate[prompts] * self.evidence[prompts] + self.mean_rate) / (self.evidence[prompts] + 1)

    def note(self, prompts: Array, means: Array, width: int) -> None:
        """Keep the mean reward of each prompt's tree."""
        old = 0.5 * self.evidence[prompts]
        self.rate[prompts] = (self.rate[prompts] * old + means * width) / (old + width)
        self.evidence[prompts] = old + width
        self.mean_rate += 0.02 * (float(means.mean()) - self.mean_rate)


# Baselines


@dataclass(frozen=True)
class Arm:
    """How to sample, and what rewards are compared with."""

    rule: str = "independent"
    width: int = 16
    baseline: str = "mean"
    """`mean` or `score` of the leaves that are not below; `eq5`; `past`, `value`: by regression on these and more;
    `exact` and `half`: the true value of the prefix, or half of what is missing to it."""
    heaviest: bool = True
    insight: float = 0.4
    """How well the hidden state tells a right path from a wrong one: 0.4 ranks 71 % of the pairs, 0.9 90 %."""


def hidden_features(
    world: World,
    policy: tuple[Array, Array],
    prompts: Array,
    levels: list[Level],
    insight: float,
    rng: np.random.Generator,
) -> list[Array]:
    """
    `(T, N, 4 * LEVELS)` per level: what can be read from a path before its next decision.

    Noisy signs of whether the path is right and of how hard the rest of the prompt is: they rank right above wrong
    paths of a prompt in 71 % of the pairs.
    """
    right = world.right(policy[0])[prompts]
    features: list[Array] = []
    for depth in range(len(levels)):
        before = np.ones((len(prompts), 1), bool) if depth == 0 else levels[depth - 1].is_right
        sign = np.where(before, 1.0, -1.0) * insight + rng.normal(size=before.shape)
        sign = np.zeros_like(sign) if depth == 0 else sign
        rest = np.log(right[:, depth:].prod(1).clip(1e-3, 1)) + world.difficulty_noise[prompts]
        x = np.zeros((*before.shape, 4 * LEVELS))
        x[..., 4 * depth] = 1
        x[..., 4 * depth + 1] = sign
        x[..., 4 * depth + 2] = np.exp(np.minimum(rest, 0))[:, None]
        x[..., 4 * depth + 3] = x[..., 4 * depth + 2] * sign
        features.append(x)
    return features


def of_parents(values: Array, level: Level) -> Array:
    """`(T, N, ...)` of the children from `(T, parents, ...)`."""
    return values[np.arange(len(values))[:, None], level.parent]


def leave_out(levels: list[Level], rewards: Array, leaf_weight: Array, otherwise: Array) -> list[Array]:
    """Mean reward of the leaves that are not below each node, weighted by `leaf_weight` `(T, leaves)`."""
    sums, sizes = sums_below(levels, leaf_weight * rewards), sums_below(levels, leaf_weight)
    total, size = sums[-1].sum(1, keepdims=True), sizes[-1].sum(1, keepdims=True)
    baselines = []
    for below, own in zip(sums, sizes, strict=True):
        rest = size - own
        mean = np.where(rest > 1e-9 * size, (total - below) / np.maximum(rest, 1e-12), otherwise[:, None])
        baselines.append(mean)
    return baselines


def advantages(
    arm: Arm,
    world: World,
    policy: tuple[Array, Array],
    prompts: Array,
    levels: list[Level],
    learner: Learner,
    rng: np.random.Generator,
) -> list[Array]:
    """`(T, N)` per level: what each node's score is multiplied with, times the node's weight."""
    rewards = levels[-1].is_right.astype(float)
    values, past = node_values(levels, rewards), learner.past(prompts)
    if arm.baseline == "eq5":
        return eq5(levels, rewards)
    if arm.baseline in ("exact", "half"):
        right, share = world.right(policy[0])[prompts], 1.0 if arm.baseline == "exact" else 0.5
        bases = []
        for depth, level in enumerate(levels):
            before = np.ones((len(prompts), 1)) if depth == 0 else levels[depth - 1].is_right
            true = of_parents(before * right[:, depth:].prod(1)[:, None], level)
            bases.append(share * true + (1 - share) * past[:, None])
    else:
        path_score = levels[0].score
        for level in levels[1:]:
            path_score = of_parents(path_score, level) + level.score
        leaf_weight = levels[-1].weight * (1.0 if arm.baseline == "mean" else path_score)
        bases = leave_out(levels, rewards, leaf_weight, past)
        if arm.baseline in ("past", "value"):
            bases = regressed(arm, world, policy, prompts, levels, learner, values, bases, rng)
    return [level.weight * (value - base) for level, value, base in zip(levels, values, bases, strict=True)]


def regressed(
    arm: Arm,
    world: World,
    policy: tuple[Array, Array],
    prompts: Array,
    levels: list[Level],
    learner: Learner,
    values: list[Array],
    others: list[Array],
    rng: np.random.Generator,
) -> list[Array]:
    """Baselines by the regression of earlier batches, which then learns from this one."""
    past = learner.past(prompts)[:, None]
    columns = [[other, np.broadcast_to(past, other.shape)] for other in others]
    features = hidden_features(world, policy, prompts, levels, arm.insight, rng) if arm.baseline == "value" else []
    for column, x, level in zip(columns, features, levels, strict=False):
        guess = (x @ learner.value.coefficients()).clip(0, 1)
        column.append(of_parents(guess, level))
    inputs = [np.stack(column, -1) for column in columns]
    if learner.baseline is None:
        start = np.zeros(inputs[0].shape[-1])
        start[0] = 1.0
        learner.baseline = Regression(start, 200.0)
    bases = [x @ learner.baseline.coefficients() for x in inputs]
    weights = [level.weight**2 * level.score for level in levels]
    learner.baseline.add(
        np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs]),
        np.concatenate([v.ravel() for v in values]),
        np.concatenate([w.ravel() for w in weights]),
    )
    for depth, x in enumerate(features):
        target = (levels[0].weight * values[0]).sum(1, keepdims=True) if depth == 0 else values[depth - 1]
        count = np.ones_like(target)
        learner.value.add(x.reshape(-1, x.shape[-1]), target.ravel(), count.ravel())
    return bases


def eq5(levels: list[Level], rewards: Array) -> list[Array]:
    """Eq. 5 of TreePO: the mean over the groups of a leaf of reward minus group mean, leaves alike."""
    width = rewards.shape[1]
    sums, counts = sums_below(levels, rewards), sums_below(levels, np.ones_like(rewards))
    terms = rewards - rewards.mean(1, keepdims=True)
    groups = np.ones_like(rewards)
    place = np.broadcast_to(np.arange(width), rewards.shape)
    for depth in range(len(levels) - 1, -1, -1):
        size, total = (np.take_along_axis(x[depth], place, 1) for x in (counts, sums))
        terms = terms + np.where(size > 1, rewards - total / size, 0)
        groups = groups + (size > 1)
        place = np.take_along_axis(levels[depth].parent, place, 1)
    return sums_below(levels, terms / groups / width)


# Runs


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: Arm
    family: str
    seed: int
    rate: float
    budget: int
    tokens: int


def train(run: Run) -> tuple[list[tuple[int, float]], float]:
    """Expected reward after numbers of tokens, and the lowest mean entropy in nats that the policy came to."""
    world, rng, arm = World(run.family, run.seed), np.random.default_rng(run.seed), run.arm
    weights, first, second = np.zeros(WEIGHTS), np.zeros(WEIGHTS), np.zeros(WEIGHTS)
    learner, order = Learner(), np.zeros(0, int)
    spent, step, curve, entropy = 0, 0, [], math.inf
    while spent < run.budget:
        policy = world.policy(weights)
        if step % 4 == 0:
            curve.append((spent, float(world.right(policy[0]).prod(1).mean())))
            entropy = min(entropy, float(-(policy[1] * np.log(policy[1] + 1e-12)).sum(-1).mean()))
        widths = widths_of(arm.rule, arm.width, learner.variances)
        num = max(1, round(run.tokens / sum(widths)))
        while len(order) < num:
            order = np.concatenate([order, rng.permutation(PROMPTS)])
        prompts, order = order[:num], order[num:]
        levels = grow(world, policy, prompts, widths, arm.heaviest, rng)
        slope = gradient(world, policy, prompts, levels, advantages(arm, world, policy, prompts, levels, learner, rng))
        rewards = levels[-1].is_right.astype(float)
        if arm.rule == "measured":
            found = resolved_variances(levels, node_values(levels, rewards))
            learner.variances = np.where(np.isnan(found), learner.variances, 0.95 * learner.variances + 0.05 * found)
        learner.note(prompts, (levels[-1].weight * rewards).sum(1), arm.width)
        spent, step = spent + num * sum(widths), step + 1
        slope /= num
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        weights += run.rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    curve.append((spent, float(world.right(world.policy(weights)[0]).prod(1).mean())))
    return curve, entropy


def tokens_to(curve: list[tuple[int, float]], target: float) -> float:
    """Tokens at which the reward first comes to `target`, on lines between the points; infinite if never."""
    for (x, y), (next_x, next_y) in itertools.pairwise(curve):
        if next_y >= target:
            return x + (next_x - x) * (target - y) / (next_y - y) if y < target else x
    return math.inf


ARMS = {
    "grpo 16": Arm(),
    "grpo 8": Arm(width=8),
    "grpo 4": Arm(width=4),
    "grpo 2": Arm(width=2),
    "paper 16": Arm("early", baseline="eq5", heaviest=False),
    "early 16": Arm("early", heaviest=False),
    "spread 16": Arm("spread", heaviest=False),
    "spread 16 heaviest": Arm("spread"),
    "sqrt 16": Arm("sqrt"),
    "sqrt 16 even": Arm("sqrt", heaviest=False),
    "measured 16": Arm("measured"),
    "grpo 16 score": Arm(baseline="score"),
    "grpo 8 score": Arm(width=8, baseline="score"),
    "grpo 4 score": Arm(width=4, baseline="score"),
    "sqrt 16 score": Arm("sqrt", baseline="score"),
    "measured 16 score": Arm("measured", baseline="score"),
    "measured 8 score": Arm("measured", 8, "score"),
    "grpo 16 past": Arm(baseline="past"),
    "grpo 8 past": Arm(width=8, baseline="past"),
    "grpo 4 past": Arm(width=4, baseline="past"),
    "measured 8 past": Arm("measured", 8, "past"),
    "grpo 16 value": Arm(baseline="value"),
    "grpo 8 value": Arm(width=8, baseline="value"),
    "grpo 4 value": Arm(width=4, baseline="value"),
    "sqrt 8 value": Arm("sqrt", 8, "value"),
    "measured 16 value": Arm("measured", 16, "value"),
    "measured 8 value": Arm("measured", 8, "value"),
    "measured 4 value": Arm("measured", 4, "value"),
    "grpo 8 value+": Arm(width=8, baseline="value", insight=0.9),
    "sqrt 8 value+": Arm("sqrt", 8, "value", insight=0.9),
    "sqrt 4 value+": Arm("sqrt", 4, "value", insight=0.9),
    "sqrt 8 score": Arm("sqrt", 8, "score"),
    "sqrt 16 past": Arm("sqrt", 16, "past"),
    "sqrt 8 past": Arm("sqrt", 8, "past"),
    "measured 4 half": Arm("measured", 4, "half"),
    "grpo 4 exact": Arm(width=4, baseline="exact"),
    "measured 4 exact": Arm("measured", 4, "exact"),
}


def main() -> None:
    """Print a table per family."""
    options = parse_options()
    with multiprocessing.Pool(options.jobs) as pool:
        for family in options.families:
            print(f"\n`{family}`, {options.seeds} seeds, steps of {options.tokens} tokens\n")
            print(
                table_head(
                    "arm", "rate", f"tokens to {options.target}", "over the first arm", "worst seed", "end", "entropy"
                )
            )
            reference: Array | None = None
            for name in options.arms:
                rate, tokens, ends, entropy = best_rate(pool, name, family, options)
                reference = tokens if reference is None else reference
                logs = np.log(tokens / reference)
                error = logs.std(ddof=1) / len(logs) ** 0.5 if np.isfinite(logs).all() else math.inf
                cells = f"{np.exp(logs.mean()):.2f} ± {np.exp(logs.mean()) * error:.2f}", f"{np.exp(logs.max()):.2f}"
                row = f"{np.median(tokens):.0f}", *cells, f"{ends.mean():.3f}", f"{entropy:.2f}"
                print(table_row(name, f"{rate}", *row), flush=True)


def best_rate(
    pool: multiprocessing.pool.Pool, name: str, family: str, options: argparse.Namespace
) -> tuple[float, Array, Array, float]:
    """The learning rate with the fewest tokens in the geometric mean; tokens and last reward of each seed, entropy."""
    found: list[tuple[float, Array, Array, float]] = []
    for rate in options.rates:
        runs = [Run(ARMS[name], family, seed, rate, options.budget, options.tokens) for seed in range(options.seeds)]
        results = pool.map(train, runs)
        tokens = np.array([tokens_to(curve, options.target) for curve, _ in results])
        ends = np.array([curve[-1][1] for curve, _ in results])
        found.append((rate, tokens, ends, min(low for _, low in results)))
    return min(found, key=lambda each: (np.log(each[1]).mean(), -each[2].mean()))


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.015, 0.03, 0.06, 0.12, 0.25], help="learning rates"
    )
    parser.add_argument("--budget", type=int, default=400_000, help="tokens of a run")
    parser.add_argument("--tokens", type=int, default=800, help="tokens of a step")
    parser.add_argument("--target", type=float, default=0.6, help="expected reward")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
