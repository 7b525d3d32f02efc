"""
Whether prompts selected by their pass rate teach a small language model more per decoded token.

    python -m benchmarks.learning_selection --jobs 2   # an hour on two cores

The model and the arms are those of `benchmarks.learning`, with `gcd` tasks. Six of ten tasks have numbers of four
digits, which the model was never shown: they are hopeless, and cost the longest completions. There are 240 tasks, so
that a run sees each of them several times. The held-out tasks are of the kind that can be learned.

`select` takes a prompt of the stream with the probability `4 p (1 - p)` of its pass rate so far, a fifth at least, as
in `benchmarks.proxy_selection`. `dynamic sampling` is the package's: prompts without signal are replaced.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import reasoning_gym
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from benchmarks import learning
from benchmarks.common import table_head, table_row
from benchmarks.learning import ARMS, interpolate, mean_of_curve, settings
from benchmarks.learning_runs import results_of, runs_parser, train_and_write
from benchmarks.learning_tasks import datasets_of
from treepo_trl import TreePOTrainer
from treepo_trl.quickstart import answer_reward


NUM_TASKS, HOPELESS = 240, 0.6
EXPLORED = 0.2
"""Least probability with which a prompt of the stream is taken."""
RUNS = {
    "8 completions": ("score baseline 8", ""),
    "8 completions, dynamic sampling": ("score baseline 8", "dynamic"),
    "8 completions, selected": ("score baseline 8", "select"),
    "8 leaves, sqrt": ("sqrt 8", ""),
    "8 leaves, sqrt, dynamic sampling": ("sqrt 8", "dynamic"),
    "8 leaves, sqrt, selected": ("sqrt 8", "select"),
}


def tasks(seed: int) -> Dataset:
    """Hopeless and other tasks, with columns `prompt`, `answer` and `index`."""
    known, _ = datasets_of("gcd", 1, seed)
    entries = reasoning_gym.create_dataset(
        "gcd",
        size=round(NUM_TASKS * HOPELESS),
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
    mixed = concatenate_datasets([Dataset.from_list(rows), known.select(range(NUM_TASKS - len(rows)))])
    return mixed.add_column("index", list(range(NUM_TASKS)))  # pyright: ignore[reportCallIssue]


class PassRates:
    """Outcomes by prompt, and the reward function that notes them; older visits count half as much each."""

    __name__ = "answer"

    def __init__(self) -> None:
        self.right, self.number = np.zeros(NUM_TASKS), np.zeros(NUM_TASKS)

    def __call__(self, completions: list[str], answer: list[str], index: list[int], **given: object) -> list[float]:
        """Rewards of `answer_reward`."""
        rewards = answer_reward(completions, answer)
        for prompt in set(index):
            own = [reward for reward, each in zip(rewards, index, strict=True) if each == prompt]
            self.right[prompt] = self.right[prompt] / 2 + sum(own)
            self.number[prompt] = self.number[prompt] / 2 + len(own)
        return rewards

    def chance(self, prompt: int) -> float:
        """Of being taken; 1 before the first visit."""
        if not self.number[prompt]:
            return 1.0
        rate = (self.right[prompt] + 0.5) / (self.number[prompt] + 1)
        return max(4 * rate * (1 - rate), EXPLORED)


class SelectedPrompts(Sampler[int]):
    """Passes over all prompts, of which each is taken with its chance at that moment."""

    def __init__(self, rates: PassRates, repeats: int, seed: int) -> None:
        self.rates, self.repeats, self.rng = rates, repeats, np.random.default_rng(seed)

    def __iter__(self) -> Iterator[int]:
        while True:
            for prompt in self.rng.permutation(NUM_TASKS).tolist():
                if self.rng.random() < self.rates.chance(prompt):
                    yield from [prompt] * self.repeats

    def __len__(self) -> int:
        return 10**9


class SelectingTrainer(TreePOTrainer):
    """Draws its prompts by their pass rates."""

    pass_rates: PassRates

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        return SelectedPrompts(self.pass_rates, self.num_generations, self.args.seed)


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """One run; writes `result.json`."""
    arm, rule = RUNS[name]
    folder = run_folder(name, seed, options)
    args = settings(ARMS[arm], "gcd", seed, options.rate, options, folder)
    if rule == "dynamic":
        args.dynamic_sampling_rounds = 2
    rates = PassRates()
    trainer = (SelectingTrainer if rule == "select" else TreePOTrainer)(
        model=str(options.out / f"gcd-{learning.WARM_START}"),
        reward_funcs=rates,
        args=args,
        train_dataset=tasks(seed),
    )
    if isinstance(trainer, SelectingTrainer):
        trainer.pass_rates = rates
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
