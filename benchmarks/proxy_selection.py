"""
Which choice of what to grow next learns most per decoded token, on the policy of `benchmarks.learning_proxy`.

    python -m benchmarks.proxy_selection            # every arm; hours on 2 cores

`benchmarks.selection_noise` judges the same rules at a policy that stands still.

Prompts have first pass rates from a population: many hopeless ones, most in the middle, or many solved ones.

- replay: a node whose leaves disagree becomes a prompt of a later step. It is given, and no decision of it is learned.
- select: a prompt of the stream is taken with the probability `4 p (1 - p)` of its last pass rates, a fifth at least.
- scouts: the rest of a prompt's leaves is grown only if the first ones differ.
- update: gradients of a part of the leaves, by systematic resampling with weights.

Arms take steps of the same number of decoded tokens, with Adam, at their best learning rate of a grid, and share the
seeds. The target is a third of the way from the first mean reward to 1, over 600 prompts.
"""

import argparse
import math
import multiprocessing
import multiprocessing.pool
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.common import make_parser, table_head, table_row
from benchmarks.decisions import (
    LEVELS,
    POPULATIONS,
    PROMPTS,
    WEIGHTS,
    Array,
    Level,
    World,
    gradient,
    grow,
    node_values,
    sums_below,
    widths_of,
)
from benchmarks.learning_proxy import Learner, leave_out, of_parents, tokens_to


EXPLORED = 0.2
"""Least probability with which a prompt of the stream is taken."""
STORED, OLDEST = 200, 8
"""Nodes that are kept, and for how many steps."""


@dataclass(frozen=True)
class Arm:
    """How to sample, and what is grown next."""

    rule: str = "independent"
    width: int = 16
    select: bool = False
    scouts: int = 0
    replay: float = 0.0
    """Part of the trees that start from a stored node."""
    updated: int | None = None
    """Leaves whose gradients are taken."""


@dataclass(frozen=True)
class Job:
    """A tree to grow: prompt, right decisions that are given, and the value of what is given."""

    prompt: int
    start: int = 0
    value: float = 0.0
    born: int = 0


@dataclass
class Chooser:
    """What is grown next."""

    arm: Arm
    rng: np.random.Generator
    num_prompts: int = PROMPTS
    learner: Learner = field(default_factory=Learner)
    order: list[int] = field(default_factory=list[int])
    store: list[Job] = field(default_factory=list[Job])

    def next(self, step: int) -> Job:
        """A stored node, or the next prompt of the stream that is taken."""
        self.store = [job for job in self.store[-STORED:] if step - job.born < OLDEST]
        if self.store and self.rng.random() < self.arm.replay:
            return self.store.pop(self.rng.integers(len(self.store)))
        while True:
            if not self.order:
                self.order = self.rng.permutation(self.num_prompts).tolist()
            prompt = self.order.pop()
            rate = float(self.learner.past(np.array([prompt]))[0])
            chance = 1.0 if self.learner.evidence[prompt] == 0 else max(4 * rate * (1 - rate), EXPLORED)
            if not self.arm.select or self.rng.random() < chance:
                return Job(prompt)

    def keep(self, jobs: list[Job], levels: list[Level], step: int) -> None:
        """Store at most one node of each tree: the deepest with two levels below whose leaves disagree."""
        values = node_values(levels, levels[-1].is_right.astype(float))
        for i, job in enumerate(jobs):
            if job.start:
                continue
            for depth in range(len(levels) - 3, -1, -1):
                open_nodes = values[depth][i][(values[depth][i] > 0.25) & (values[depth][i] < 0.75)]
                if len(open_nodes):
                    self.store.append(Job(job.prompt, job.start + depth + 1, float(open_nodes[0]), step))
                    break


def joined(scouts: list[Level], rest: list[Level], share: float) -> list[Level]:
    """One tree of two: `share` is the weight of the first."""
    levels: list[Level] = []
    for depth, (a, b) in enumerate(zip(scouts, rest, strict=True)):
        offset = 0 if depth == 0 else scouts[depth - 1].weight.shape[1]
        both = [
            np.concatenate([getattr(a, name), getattr(b, name)], 1)
            for name in ("option", "others", "is_taken", "score", "is_right")
        ]
        weight = np.concatenate([a.weight * share, b.weight * (1 - share)], 1)
        levels.append(Level(np.concatenate([a.parent, b.parent + offset], 1), weight, *both))
    return levels


def has_signal(levels: list[Level]) -> Array:
    """`(T,)` bool: whether the leaves of a tree differ."""
    return np.asarray(levels[-1].is_right.any(1) & ~levels[-1].is_right.all(1))


def advantages(levels: list[Level], otherwise: Array) -> list[Array]:
    """`(T, N)` per level: node's weight times its value minus the score-weighted mean of the other leaves."""
    rewards, path_score = levels[-1].is_right.astype(float), levels[0].score
    for level in levels[1:]:
        path_score = of_parents(path_score, level) + level.score
    bases = leave_out(levels, rewards, levels[-1].weight * path_score, otherwise)
    values = node_values(levels, rewards)
    return [level.weight * (value - base) for level, value, base in zip(levels, values, bases, strict=True)]


def resampled(levels: list[Level], slopes: list[Array], count: int, rng: np.random.Generator) -> list[Array]:
    """Advantages for a gradient of `count` leaves a tree, as often as their weight and advantage say, and exact."""
    leaf = np.abs(slopes[-1]) + 1e-3 * levels[-1].weight
    share = np.minimum(leaf / leaf.sum(1, keepdims=True) * count, 1.0)
    for _ in range(8):  # what is cut at one leaf is spread over the others
        free = share < 1
        missing = count - (~free).sum(1, keepdims=True)
        total = np.maximum((leaf * free).sum(1, keepdims=True), 1e-12)
        share = np.where(free, np.minimum(leaf * missing / total, 1.0), 1.0)
    edges = share.cumsum(1) + rng.random((len(share), 1))
    before = np.concatenate([edges[:, :1] - share[:, :1], edges[:, :-1]], 1)
    is_taken = np.floor(edges) > np.floor(before)
    kept = sums_below(levels, levels[-1].weight * is_taken / share)
    return [slope * below / level.weight for slope, below, level in zip(slopes, kept, levels, strict=True)]


def trees(
    arm: Arm, world: World, policy: tuple[Array, Array], jobs: list[Job], widths: list[int], rng: np.random.Generator
) -> tuple[list[tuple[list[Job], list[Level]]], int, int]:
    """Trees of jobs that start alike, their decoded tokens, and their leaves."""
    grown: list[tuple[list[Job], list[Level]]] = []
    tokens = leaves = 0
    for start in sorted({job.start for job in jobs}):
        own = [job for job in jobs if job.start == start]
        prompts = np.array([job.prompt for job in own])
        if start or not arm.scouts:
            grown.append((own, grow(world, policy, prompts, widths, True, rng, start)))
            tokens, leaves = tokens + len(own) * sum(widths[start:]), leaves + len(own) * widths[-1]
            continue
        scouts = grow(world, policy, prompts, [arm.scouts] * LEVELS, True, rng)
        tokens, leaves = tokens + len(own) * arm.scouts * LEVELS, leaves + len(own) * arm.scouts
        is_open = has_signal(scouts)
        for flag in (False, True):
            part = np.flatnonzero(is_open == flag)
            if not len(part):
                continue
            chosen = [each_of(level, part) for level in scouts]
            if flag:
                rest = grow(world, policy, prompts[part], widths, True, rng)
                chosen = joined(chosen, rest, arm.scouts / arm.width)
                tokens, leaves = tokens + len(part) * sum(widths), leaves + len(part) * widths[-1]
            grown.append(([own[i] for i in part], chosen))
    return grown, tokens, leaves


def each_of(level: Level, which: Array) -> Level:
    """The level of some of the trees."""
    names = ("parent", "weight", "option", "others", "is_taken", "score", "is_right")
    return Level(*(getattr(level, name)[which] for name in names))


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: Arm
    family: str
    population: str
    prompts: int
    seed: int
    rate: float
    budget: int
    tokens: int


def world_of(family: str, seed: int, population: str) -> World:
    """A world whose prompts have pass rates of a population, or those that the family has anyway."""
    return World(family, seed, None if population == "family" else population)


def train(run: Run) -> tuple[list[tuple[int, float]], float]:
    """Expected reward after numbers of decoded tokens, and leaves per useful prompt."""
    world, rng, arm = world_of(run.family, run.seed, run.population), np.random.default_rng(run.seed), run.arm
    weights, first, second = np.zeros(WEIGHTS), np.zeros(WEIGHTS), np.zeros(WEIGHTS)
    chooser, curve = Chooser(arm, rng, run.prompts), []
    widths = widths_of(arm.rule, arm.width - arm.scouts, np.zeros(LEVELS))
    spent, step, cost, leaves, useful = 0, 0, float(sum(widths) + arm.scouts * LEVELS), 0, 0
    while spent < run.budget:
        policy = world.policy(weights)
        if step % 4 == 0:
            curve.append((spent, float(world.right(policy[0]).prod(1).mean())))
        jobs = [chooser.next(step) for _ in range(max(1, round(run.tokens / cost)))]
        grown, tokens, num_leaves = trees(arm, world, policy, jobs, widths, rng)
        slope = np.zeros(WEIGHTS)
        for own, levels in grown:
            prompts, start = np.array([job.prompt for job in own]), own[0].start
            past = np.array([job.value for job in own]) if start else chooser.learner.past(prompts)
            slopes = advantages(levels, past)
            if arm.updated is not None:
                slopes = resampled(levels, slopes, arm.updated, rng)
            slope += gradient(world, policy, prompts, levels, slopes, start)
            signal = int(has_signal(levels).sum())
            useful += signal
            if not start:
                means = (levels[-1].weight * levels[-1].is_right).sum(1)
                chooser.learner.note(prompts, means, levels[-1].weight.shape[1])
            if arm.replay:
                chooser.keep(own, levels, step)
        spent, step, leaves = spent + tokens, step + 1, leaves + num_leaves
        cost += 0.1 * (tokens / len(jobs) - cost)
        slope /= len(jobs)  # also of those whose scouts agreed: their part is 0
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        weights += run.rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    curve.append((spent, float(world.right(world.policy(weights)[0]).prod(1).mean())))
    return curve, leaves / max(useful, 1)


ARMS = {
    "grpo 16": Arm(),
    "grpo 8": Arm(width=8),
    "grpo 8 select": Arm(width=8, select=True),
    "grpo 16 scouts": Arm(scouts=4),
    "sqrt 16": Arm("sqrt"),
    "sqrt 16 select": Arm("sqrt", select=True),
    "sqrt 16 scouts": Arm("sqrt", scouts=4),
    "sqrt 16 replay": Arm("sqrt", replay=0.5),
    "sqrt 16 select replay": Arm("sqrt", select=True, replay=0.5),
    "sqrt 16 all": Arm("sqrt", select=True, scouts=4, replay=0.5),
    "sqrt 16 update 8": Arm("sqrt", updated=8),
    "grpo 16 update 8": Arm(updated=8),
    "sqrt 8": Arm("sqrt", 8),
    "sqrt 8 replay": Arm("sqrt", 8, replay=0.5),
}


def best_rate(
    results: Callable[[list[Run]], list[tuple[list[tuple[int, float]], float]]],
    arm: Arm,
    population: str,
    options: argparse.Namespace,
) -> tuple[float, Array, Array, float]:
    """The learning rate with the fewest tokens in the geometric mean; tokens and mean reward of each seed, leaves."""
    found: list[tuple[float, Array, Array, float]] = []
    for rate in options.rates:
        runs = [
            Run(arm, options.family, population, options.prompts, seed, rate, options.budget, options.tokens)
            for seed in range(options.seeds)
        ]
        curves = results(runs)
        tokens = np.array([tokens_to(curve, (1 + 2 * curve[0][1]) / 3) for curve, _ in curves])
        means = np.array([np.mean([y for _, y in curve]) for curve, _ in curves])
        found.append((rate, tokens, means, float(np.mean([leaves for _, leaves in curves]))))
    return min(found, key=lambda each: (np.log(each[1]).mean(), -each[2].mean()))


def main() -> None:
    """Print a table per population."""
    options = parse_options()
    with multiprocessing.Pool(options.jobs) as pool:
        for population in options.populations:
            print(f"\n`{population}`, {options.seeds} seeds, steps of {options.tokens} tokens\n")
            print(
                table_head(
                    "arm", "rate", "tokens to target", "over the first arm", "mean reward", "leaves per useful prompt"
                )
            )
            reference: Array | None = None
            for name in options.arms:
                rate, tokens, means, leaves = best_rate(
                    lambda runs: pool.map(train, runs), ARMS[name], population, options
                )
                reference = tokens if reference is None else reference
                logs = np.log(tokens / reference)
                error = logs.std(ddof=1) / len(logs) ** 0.5 if np.isfinite(logs).all() else math.inf
                over = f"{np.exp(logs.mean()):.2f} ± {np.exp(logs.mean()) * error:.2f}"
                print(
                    table_row(
                        name, f"{rate}", f"{np.median(tokens):.0f}", over, f"{means.mean():.3f}", f"{leaves:.1f}"
                    ),
                    flush=True,
                )


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--populations", nargs="+", default=list(POPULATIONS), choices=[*POPULATIONS, "family"])
    parser.add_argument("--family", default="even")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts that are trained on")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.12, 0.25], help="learning rates")
    parser.add_argument("--budget", type=int, default=100_000, help="tokens of a run")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of a step")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
