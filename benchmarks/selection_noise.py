"""
Noise of the batch gradient per decoded token, by what is grown next, at a policy that stands still.

    python -m benchmarks.selection_noise            # every rule; 10 minutes on a core
    python -m benchmarks.selection_noise --cost     # leaves per useful prompt of scouts, predicted and measured

The rules are those of `benchmarks.proxy_selection`, after one pass over the prompts with this policy. Replay and
selection change what is learned: they weight prompts and prefixes by how open they are. So the table has

- "along": the part of the mean gradient along that of the mean reward over all prompts, in units of its length;
- "noise": the mean squared norm of a tree's gradient over the square of that part, times its decoded tokens, over that
  of the first rule. Below 1, a decoded token says more about where the mean reward rises.

Both are means over worlds, and over the first policy and one that has learned.
"""

import argparse

import numpy as np

from benchmarks.common import make_parser, table_head, table_row
from benchmarks.decisions import (
    LEVELS,
    POPULATIONS,
    PROMPTS,
    UNSURE,
    WEIGHTS,
    Array,
    Level,
    World,
    gradient,
    grow,
    widths_of,
)
from benchmarks.proxy_selection import (
    ARMS,
    Arm,
    Chooser,
    Job,
    advantages,
    each_of,
    has_signal,
    joined,
    resampled,
    trees,
    world_of,
)


def gradient_of_mean_reward(world: World, policy: tuple[Array, Array]) -> Array:
    """`(WEIGHTS,)`: exact, over all prompts."""
    none, ones = np.zeros((PROMPTS, 1), int), np.ones((PROMPTS, 1))
    others = np.zeros((PROMPTS, 1, UNSURE), int)
    level = Level(none, ones, none, others, others > 0, ones, ones > 0)
    rewards = world.right(policy[0]).prod(1)[:, None] / PROMPTS
    return gradient(world, policy, np.arange(PROMPTS), [level] * LEVELS, [rewards] * LEVELS)


def learned(world: World, steps: int) -> Array:
    """Weights after Adam steps along the exact gradient."""
    weights, first, second = np.zeros(WEIGHTS), np.zeros(WEIGHTS), np.zeros(WEIGHTS)
    for step in range(1, steps + 1):
        slope = gradient_of_mean_reward(world, world.policy(weights))
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        weights += 0.05 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return weights


def after_a_pass(arm: Arm, world: World, policy: tuple[Array, Array], rng: np.random.Generator) -> Chooser:
    """What is known after a tree of each prompt."""
    chooser = Chooser(arm, rng)
    widths = widths_of(arm.rule, arm.width, np.zeros(LEVELS))
    levels = grow(world, policy, np.arange(PROMPTS), widths, True, rng)
    means = (levels[-1].weight * levels[-1].is_right).sum(1)
    chooser.learner.mean_rate = float(means.mean())
    chooser.learner.note(np.arange(PROMPTS), means, arm.width)
    chooser.keep([Job(i) for i in range(PROMPTS)], levels, 0)
    return chooser


def along_and_noise(
    arm: Arm, world: World, policy: tuple[Array, Array], num_trees: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Part of the mean gradient along the exact one, and mean squared norm over its square, times tokens of a tree."""
    chooser = after_a_pass(arm, world, policy, rng)
    stored, jobs = list(chooser.store), []
    for _ in range(num_trees):
        chooser.store = list(stored)
        jobs.append(chooser.next(0))
    widths = widths_of(arm.rule, arm.width - arm.scouts, np.zeros(LEVELS))
    grown, tokens, _ = trees(arm, world, policy, jobs, widths, rng)
    exact, total, squares = gradient_of_mean_reward(world, policy), np.zeros(WEIGHTS), 0.0
    for own, levels in grown:
        prompts, start = np.array([job.prompt for job in own]), own[0].start
        past = np.array([job.value for job in own]) if start else chooser.learner.past(prompts)
        slopes = advantages(levels, past)
        if arm.updated is not None:
            slopes = resampled(levels, slopes, arm.updated, rng)
        for i in range(len(own)):
            one = [each_of(level, np.array([i])) for level in levels]
            slope = gradient(world, policy, prompts[i : i + 1], one, [each[i : i + 1] for each in slopes], start)
            total, squares = total + slope, squares + float(slope @ slope)
    along = float(total @ exact) / num_trees / float(exact @ exact)
    return along, squares / num_trees / (along**2 * float(exact @ exact)) * tokens / num_trees


def print_noise(options: argparse.Namespace) -> None:
    """A row for each rule, with both figures for each population."""
    columns = [f"{population}, {what}" for population in options.populations for what in ("along", "noise")]
    print(table_head("arm", *columns))
    reference: list[float] = []
    for name in options.arms:
        cells: list[str] = []
        for number, population in enumerate(options.populations):
            found: list[tuple[float, float]] = []
            for seed in range(options.seeds):
                world = world_of(options.family, seed, population)
                for steps in (0, 15):
                    policy = world.policy(learned(world, steps))
                    rng = np.random.default_rng(seed)
                    found.append(along_and_noise(ARMS[name], world, policy, options.trees, rng))
            noise = float(np.exp(np.mean([np.log(each) for _, each in found])))
            if len(reference) == number:
                reference.append(noise)
            cells += [f"{np.mean([each for each, _ in found]):.2f}", f"{noise / reference[number]:.2f}"]
        print(table_row(name, *cells), flush=True)


def print_costs(options: argparse.Namespace) -> None:
    """Leaves per useful prompt with and without scouts, at the first policy."""
    print(table_head("population", "sampling", "useful", "scouts differ", "without scouts", "predicted", "measured"))
    width, num_scouts, rng = 16, 4, np.random.default_rng(0)
    for population in options.populations:
        world = world_of(options.family, 0, population)
        policy, prompts = world.policy(np.zeros(WEIGHTS)), np.tile(np.arange(PROMPTS), 20)
        for rule in ("independent", "sqrt"):
            scouts = grow(world, policy, prompts, [num_scouts] * LEVELS, True, rng)
            rest = grow(world, policy, prompts, widths_of(rule, width - num_scouts, np.zeros(LEVELS)), True, rng)
            differ, useful = has_signal(scouts), has_signal(joined(scouts, rest, num_scouts / width))
            u, m = useful.mean(), (differ & useful).mean() / useful.mean()
            predicted = (num_scouts + (width - num_scouts) * u * m) / (u * m)
            measured = (num_scouts * len(prompts) + (width - num_scouts) * differ.sum()) / differ.sum()
            cells = f"{u:.2f}", f"{m:.2f}", f"{width / u:.1f}", f"{predicted:.1f}", f"{measured:.1f}"
            print(table_row(population, rule, *cells), flush=True)


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--cost", action="store_true", help="leaves per useful prompt instead")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--populations", nargs="+", default=[*POPULATIONS, "family"], choices=[*POPULATIONS, "family"])
    parser.add_argument("--family", default="even")
    parser.add_argument("--seeds", type=int, default=3, help="worlds")
    parser.add_argument("--trees", type=int, default=1200)
    options = parser.parse_args()
    if options.cost:
        print_costs(options)
    else:
        print_noise(options)


if __name__ == "__main__":
    main()
