"""
Whether prompts selected by their pass rate teach a small language model more per decoded token.

    python -m benchmarks.learning_selection --seeds 6 --jobs 2   # 25 minutes on two cores

The model and the arms are those of `benchmarks.learning`, with `gcd` tasks. Six of ten tasks have numbers of four
digits, which the model was never shown: they are hopeless, and cost the longest completions. Two arms have none of
them. There are 240 tasks, so that a run sees each of them several times. The held-out tasks are of the kind that can
be learned.

*Selected* has `prompt_selection="pass_rate"`, and *dynamic sampling* `dynamic_sampling_rounds=2`.
"""

import argparse
from pathlib import Path

import numpy as np
import reasoning_gym
from datasets import Dataset, concatenate_datasets

from benchmarks import learning
from benchmarks.common import table_head, table_row
from benchmarks.learning import ARMS, interpolate, mean_of_curve, settings
from benchmarks.learning_runs import results_of, runs_parser, train_and_write
from benchmarks.learning_tasks import datasets_of
from treepo_trl import TreePOTrainer
from treepo_trl.quickstart import answer_reward


NUM_TASKS = 240
RUNS = {
    "8 completions": ("score baseline 8", "", 0.6),
    "8 completions, dynamic sampling": ("score baseline 8", "dynamic", 0.6),
    "8 completions, selected": ("score baseline 8", "select", 0.6),
    "8 leaves, sqrt": ("sqrt 8", "", 0.6),
    "8 leaves, sqrt, dynamic sampling": ("sqrt 8", "dynamic", 0.6),
    "8 leaves, sqrt, selected": ("sqrt 8", "select", 0.6),
    "8 leaves, sqrt, selected, dynamic sampling": ("sqrt 8", "select dynamic", 0.6),
    "8 leaves, sqrt, no hopeless tasks": ("sqrt 8", "", 0.0),
    "8 leaves, sqrt, no hopeless tasks, selected": ("sqrt 8", "select", 0.0),
}
"""Sampling, what chooses prompts, and the share of hopeless tasks."""


def tasks(seed: int, hopeless: float) -> Dataset:
    """Hopeless and other tasks, with columns `prompt` and `answer`."""
    known, _ = datasets_of("gcd", 1, seed)
    entries = reasoning_gym.create_dataset(
        "gcd",
        size=round(NUM_TASKS * hopeless),
        seed=seed,
        min_numbers=2,
        max_numbers=2,
        min_value=1000,
        max_value=9999,
    )
    rows = [
        {"prompt": ",".join(map(str, entry["metadata"]["numbers"])) + "\n", "answer": entry["answer"]}
        for entry in entries
    ]
    others = known.select(range(NUM_TASKS - len(rows)))
    return concatenate_datasets([Dataset.from_list(rows), others]) if rows else others


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """One run; writes `result.json`."""
    arm, rules, hopeless = RUNS[name]
    folder = run_folder(name, seed, options)
    args = settings(ARMS[arm], "gcd", seed, options.rate, options, folder)
    if "dynamic" in rules:
        args.dynamic_sampling_rounds = 2
    if "select" in rules:
        args.prompt_selection = "pass_rate"
    trainer = TreePOTrainer(
        model=str(options.out / f"gcd-{learning.WARM_START}"),
        reward_funcs=answer_reward,
        args=args,
        train_dataset=tasks(seed, hopeless),
    )
    _, held_out = datasets_of("gcd", options.held_out, seed)
    train_and_write(trainer, held_out, options, folder)


def run_folder(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run keeps its files."""
    return options.out / f"selection-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def main() -> None:
    """Run what is missing, and print the table; with `--run`, one run in this process."""
    parser = runs_parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(RUNS), choices=RUNS)
    options = parser.parse_args()
    if options.run:
        train(options.run[0], int(options.run[1]), options)
        return
    runs = [(name, seed) for name in options.arms for seed in range(options.seeds)]
    found = results_of("benchmarks.learning_selection", runs, lambda run: run_folder(*run, options), options)
    print(table_head("arm", "end", "mean of the curve", "prompts with signal", "steps"))
    for name in options.arms:
        results = [found[name, seed] for seed in range(options.seeds)]
        ends = np.array([interpolate(each, [options.tokens])[0] for each in results])
        means = np.array([mean_of_curve(each, options) for each in results])
        signal = np.mean([1 - row["tree/equal_rewards_frac"] for each in results for row in each["log"]])
        cells = [f"{column.mean():.3f} ± {column.std(ddof=min(1, len(column) - 1)):.3f}" for column in (ends, means)]
        print(table_row(name, *cells, f"{signal:.2f}", f"{np.mean([r['steps'] for r in results]):.0f}"), flush=True)


if __name__ == "__main__":
    main()
