"""
What an arm learns from equally many decoded tokens: reward of held-out tasks against tokens, several seeds.

    python -m benchmarks.learning                       # three families on small models; hours on two cores
    python -m benchmarks.learning --model MODEL --dtype bfloat16 --use_vllm --tasks gcd products  # on a GPU
    python -m benchmarks.learning --tasks gcd --seeds 1 --rates 1e-4 --tokens 2000 --warm_steps 5  # a quick look

Tasks and models are those of `benchmarks.learning_tasks`. Every arm is a `TreePOTrainer`: independent completions are
trees that branch at the prompt alone, and a test holds their loss equal to that of `GRPOTrainer`. Arms take steps of
about the same number of decoded tokens: narrow groups have more prompts.

A run stops when it has decoded its tokens. A token that several leaves share counts once, as the engine decodes it
once. Held-out reward is that of four independent completions at temperature 1. Each arm is shown at its best learning
rate, by the mean over seeds of the whole curve. Each run is a process and a folder of its own; finished runs are not
repeated, so the whole may take several sittings.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.common import (
    OUTPUTS,
    ProcessFailed,
    device_name,
    make_parser,
    run_to_log,
    small_model_folder,
    table_head,
    table_row,
)
from benchmarks.learning_tasks import TASKS, datasets_of, lora_of, warm_start
from treepo_trl import TreePOConfig, TreePOTrainer, TreeSampler, TreeSamplingConfig
from treepo_trl.engines.transformers import TransformersEngine
from treepo_trl.quickstart import answer_reward


@dataclass(frozen=True)
class Arm:
    """How an arm samples and what it compares rewards with."""

    width: int
    share: float = 1.0
    """Decoded tokens per token of a leaf, about."""
    settings: dict[str, Any] = field(default_factory=dict)

    def prompts(self, completions: int) -> int:
        """Prompts per step, for as many decoded tokens as `completions` have."""
        return max(round(completions / (self.width * self.share)), 1)


def independent(width: int, estimator: str = "grpo", **settings: object) -> Arm:
    """Completions that share nothing but the prompt: with `grpo`, the loss of `GRPOTrainer`."""
    shape = {"branch_schedule": "early", "branching_factor": 1, "initial_branching_factor": width}
    return Arm(width, 1.0, {**shape, "advantage_estimator": estimator, "leaf_weighting": "uniform", **settings})


def tree(width: int, share: float, schedule: str, estimator: str, fallback: str = "root") -> Arm:
    """A tree with an estimator; the exact ones with the weights that make them so."""
    exact = estimator in ("optimal_baseline", "leave_one_out")
    return Arm(
        width,
        share,
        {
            "branch_schedule": schedule,
            "advantage_estimator": estimator,
            "leaf_weighting": "inverse_branching" if exact else "uniform",
            "fallback_policy": fallback,
        },
    )


ARMS = {
    "GRPO 16": independent(16),
    "GRPO 8": independent(8),
    "GRPO 4": independent(4),
    "GRPO 2": independent(2),
    "GRPO 16, dynamic sampling": independent(16, dynamic_sampling_rounds=2),
    "paper 16": tree(16, 0.65, "early", "treepo", "random"),
    "paper 8": tree(8, 0.65, "early", "treepo", "random"),
    "score baseline 16": independent(16, "optimal_baseline"),
    "score baseline 8": independent(8, "optimal_baseline"),
    "sqrt 16": tree(16, 0.9, "sqrt", "optimal_baseline"),
    "sqrt 8": tree(8, 0.9, "sqrt", "optimal_baseline"),
    "sqrt 4": tree(4, 0.9, "sqrt", "optimal_baseline"),
    "sqrt 16, leave-one-out": tree(16, 0.9, "sqrt", "leave_one_out"),
    "early 16, score baseline": tree(16, 0.65, "early", "optimal_baseline"),
}
FIRST = "GRPO 16"
"""What the others are compared with."""
WARM_START = "warm start"
SHAPES = {"gcd": (64, 8), "products": (64, 8), "addition": (32, 8)}
"""Longest completion and segment length in tokens."""


class HeldOutReward:
    """Mean reward of four independent completions per held-out task at temperature 1."""

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.answers = [row["answer"] for row in dataset for _ in range(4)]
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.prompts: list[list[int]] = []
        for row in dataset:
            if isinstance(row["prompt"], str):
                self.prompts.append(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
            else:
                ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
                self.prompts.append(ids["input_ids"])

    def __call__(self, model: PreTrainedModel) -> float:
        config = TreeSamplingConfig(
            num_generations=4,
            max_completion_length=self.max_tokens,
            segment_length=self.max_tokens,
            branch_schedule="early",
            initial_branching_factor=4,
            branching_factor=1,
            stop_repetition=False,
        )
        eos = [self.tokenizer.eos_token_id]
        was_training = model.training
        model.eval()
        try:
            trees = TreeSampler(TransformersEngine(model, eos), config, eos).sample(self.prompts, seed=0)
        finally:
            model.train(was_training)
        completions = [each.completion_ids(leaf) for each in trees for leaf in each.leaves]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        return float(np.mean(answer_reward(texts, self.answers)))


class TokenBudget(TrainerCallback):
    """Counts decoded tokens, measures the held-out reward at equal distances, and stops when they are used up."""

    def __init__(self, budget: int, num_points: int, held_out: HeldOutReward) -> None:
        self.budget, self.every, self.held_out = budget, budget / num_points, held_out
        self.tokens, self.measuring = 0.0, 0.0
        self.curve: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Measure the untrained model."""
        self.started = time.perf_counter()
        self._measure(given["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Count a step."""
        if "reward" not in given["logs"]:
            return
        before = self.tokens // self.every
        self.tokens += given["logs"]["tree/decoded_tokens"]
        if self.tokens // self.every > before:
            self._measure(given["model"])
        control.should_training_stop = self.tokens >= self.budget

    def _measure(self, model: PreTrainedModel) -> None:
        begun = time.perf_counter()
        seconds = begun - self.started - self.measuring
        self.curve.append({"tokens": self.tokens, "reward": self.held_out(model), "seconds": seconds})
        self.measuring += time.perf_counter() - begun


def settings(arm: Arm, task: str, seed: int, rate: float, options: argparse.Namespace, folder: Path) -> TreePOConfig:
    """Settings of a run: those of the arm, and what every arm gets."""
    max_tokens, segment = (options.max_completion_length, options.segment_length) if options.model else SHAPES[task]
    return TreePOConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=100_000,  # the callback stops
        per_device_train_batch_size=arm.prompts(options.completions) * arm.width,
        num_generations=arm.width,
        max_completion_length=max_tokens,
        segment_length=segment,
        learning_rate=rate if task != "addition" else 5 * rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,  # Adam's first steps have the size of the learning rate, however noisy the gradient
        scale_rewards="batch",
        epsilon_high=0.28,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        use_vllm=options.use_vllm,
        model_init_kwargs={"dtype": options.dtype},
        **arm.settings,
    )


def train(name: str, task: str, seed: int, rate: float, options: argparse.Namespace) -> None:
    """One run; writes `result.json`."""
    folder = run_folder(name, task, seed, rate, options)
    train_dataset, held_out = datasets_of(task, options.held_out, seed, options.model is None)
    own = small_model_folder() if task == "addition" else str(options.out / f"{task}-{WARM_START}")
    args = settings(ARMS[name], task, seed, rate, options, folder)
    trainer = TreePOTrainer(
        model=options.model or own,
        reward_funcs=answer_reward,
        args=args,
        train_dataset=train_dataset,
        peft_config=lora_of(task) if options.model is None else None,
    )
    measure = HeldOutReward(held_out, trainer.processing_class, args.max_completion_length)
    budget = TokenBudget(options.tokens, options.points, measure)
    trainer.add_callback(budget)
    trainer.train()
    result = {
        "arm": name,
        "rate": rate,
        "seed": seed,
        "device": device_name(),
        "curve": budget.curve,
        "steps": trainer.state.global_step,
        "log": [log for log in trainer.state.log_history if "reward" in log],
    }
    (folder / "result.json").write_text(json.dumps(result))


def start(name: str, task: str, seed: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Result of one run, which runs in a process of its own if it is not there yet."""
    file = run_folder(name, task, seed, rate, options) / "result.json"
    if not file.exists():
        in_process(options, file.parent, name, task, str(seed), str(rate))
    return json.loads(file.read_text())


def run_folder(name: str, task: str, seed: int, rate: float, options: argparse.Namespace) -> Path:
    """Where a run keeps its files."""
    return options.out / f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"


def in_process(options: argparse.Namespace, folder: Path, *run: str) -> None:
    """Run this script for one run."""
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    try:
        command = ["-m", "benchmarks.learning", *sys.argv[1:], "--run", *run]
        run_to_log(command, folder / "log.txt", OMP_NUM_THREADS=threads)
    except ProcessFailed as error:
        raise SystemExit(f"{' '.join(run)} failed: {error}") from None
    print(f"{' '.join(run)} done", file=sys.stderr, flush=True)


def interpolate(result: dict[str, Any], tokens: Sequence[float] | np.ndarray) -> np.ndarray:
    """Held-out reward of a run at these numbers of decoded tokens, on lines between its measurements."""
    curve = result["curve"]
    return np.interp(tokens, [point["tokens"] for point in curve], [point["reward"] for point in curve])


def mean_of_curve(result: dict[str, Any], options: argparse.Namespace) -> float:
    """Mean held-out reward over the tokens of a run."""
    return float(interpolate(result, np.linspace(0, options.tokens, 101)).mean())


def cost_to(target: float, runs: Sequence[dict], axis: str, tokens: np.ndarray) -> float:
    """Tokens or seconds at which the mean curve of runs first comes to `target`, or those of the whole run."""
    curve = np.mean([interpolate(run, tokens) for run in runs], axis=0)
    reached = tokens[np.argmax(curve >= target)] if curve.max() >= target else tokens[-1]
    if axis == "tokens":
        return float(reached)
    points = [([point["tokens"] for point in run["curve"]], [point[axis] for point in run["curve"]]) for run in runs]
    return float(np.mean([np.interp(reached, *each) for each in points]))


def ratio(results: list[dict], reference: list[dict], target: float, axis: str, budget: float) -> str:
    """Cost to `target` over the reference's, and the middle 90 % of bootstrap samples over seeds."""
    tokens, rng = np.linspace(0, budget, 301), np.random.default_rng(0)
    draws = [list(range(len(results))), *rng.integers(0, len(results), (500, len(results))).tolist()]
    costs = [
        [cost_to(target, [runs[i] for i in draw], axis, tokens) for draw in draws] for runs in (results, reference)
    ]
    ratios = np.divide(*costs)
    low, high = np.quantile(ratios[1:], [0.05, 0.95])
    return f"{ratios[0]:.2f} ({low:.2f} to {high:.2f})"


def print_table(task: str, runs: dict[str, list[dict]], options: argparse.Namespace) -> None:
    """Held-out reward of each arm at fractions of the budget, and what it costs to come as far as the first arm."""
    points = [options.tokens * quarter / 4 for quarter in range(5)]
    first = runs[FIRST]
    # The mean over seeds and the last quarter: the end of one run is noisy.
    target = float(np.mean([interpolate(each, np.linspace(0.75, 1, 11) * options.tokens).mean() for each in first]))
    print(f"\n`{task}`, {first[0]['device']}, {len(first)} seeds, target {target:.3f}\n")
    columns = [f"{point / 1000:.0f}k" for point in points]
    print(table_head("arm", "rate", *columns, "mean of the curve", "tokens to the target", "seconds", "steps"))
    for name, results in runs.items():
        curves = np.array([interpolate(result, points) for result in results])
        means = np.array([mean_of_curve(result, options) for result in results])
        cells = [
            f"{column.mean():.3f} ± {column.std(ddof=min(1, len(results) - 1)):.3f}" for column in [*curves.T, means]
        ]
        costs = [ratio(results, first, target, axis, options.tokens) for axis in ("tokens", "seconds")]
        steps = f"{np.mean([result['steps'] for result in results]):.0f}"
        print(table_row(name, f"{results[0]['rate']:g}", *cells, *costs, steps))


def draw(results: dict[str, dict[str, list[dict]]], budget: int, file: Path) -> None:
    """A panel per task, a line per arm: mean over seeds, and the range of the seeds as a band."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tokens = np.linspace(0, budget, 101)
    figure, panels = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False)
    for panel, (task, runs) in zip(panels[0], results.items(), strict=True):
        for arm, seeds in runs.items():
            curves = np.array([interpolate(result, tokens) for result in seeds])
            (line,) = panel.plot(tokens / 1000, curves.mean(0), label=arm)
            panel.fill_between(tokens / 1000, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.1)
        panel.set(title=task, xlabel="decoded tokens, thousands", ylabel="held-out reward")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    print(f"\n{file}", file=sys.stderr)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, of the command line if none are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="a chat model for all families, instead of their own")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--use_vllm", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 2e-4, 4e-4], help="times 5 for `addition`")
    parser.add_argument("--tokens", type=int, default=150_000, help="decoded tokens of a run")
    parser.add_argument("--points", type=int, default=6, help="measurements of a run")
    parser.add_argument("--held_out", type=int, default=128, help="tasks of a measurement, four completions each")
    parser.add_argument("--completions", type=int, default=128, help="per step, of independent completions")
    parser.add_argument("--max_completion_length", type=int, default=1024, help="with `--model`")
    parser.add_argument("--segment_length", type=int, default=128, help="with `--model`")
    parser.add_argument("--warm_steps", type=int, default=800, help="of the small model on demonstrations")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "learning")
    parser.add_argument("--plot", type=Path, default=OUTPUTS / "learning/learning.png")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """Results of all seeds by task and arm, each arm at its best rate; runs what is missing."""
    arms = list(dict.fromkeys([FIRST, *options.arms]))
    for task in options.tasks:
        folder = options.out / f"{task}-{WARM_START}"
        if options.model is None and task != "addition" and not (folder / "config.json").exists():
            in_process(options, folder.with_name(folder.name + "-sft"), WARM_START, task)
    results: dict[str, dict[str, list[dict]]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for task in options.tasks:
            runs = list(product(arms, [task], range(options.seeds), options.rates))
            found = dict(zip(runs, pool.map(lambda run: start(*run, options), runs), strict=True))
            results[task] = {}
            for name in arms:
                by_rate = [[found[name, task, seed, rate] for seed in range(options.seeds)] for rate in options.rates]
                results[task][name] = max(by_rate, key=lambda each: sum(mean_of_curve(run, options) for run in each))
    return results


def main() -> None:
    """Run what is missing, print the table and draw the plot; with `--run`, one run in this process."""
    options = parse_options()
    if options.run and options.run[0] == WARM_START:
        warm_start(options.run[1], options.out / f"{options.run[1]}-{WARM_START}", options.warm_steps)
    elif options.run:
        name, task, seed, rate = options.run
        train(name, task, int(seed), float(rate), options)
    else:
        by_task = run_all(options)
        for task, arms in by_task.items():
            print_table(task, arms, options)
        draw(by_task, options.tokens, options.plot)


if __name__ == "__main__":
    main()
