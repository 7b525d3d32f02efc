"""
What the estimators learn from equally many decoded tokens: reward of held-out tasks against tokens, several seeds.

    python -m benchmarks.learning                       # a small model; table and plot
    python -m benchmarks.learning --model MODEL --dtype bfloat16 --use_vllm  # a real model on one GPU
    python -m benchmarks.learning --tasks gcd --seeds 1 --tokens 2000 --warm_steps 5  # a quick look

There are two families of tasks from reasoning-gym. The reward is 1 if the last number is the answer, else 0.

Without `--model` the policy is a Llama of 2.7 million parameters with a token per character. TRL's `SFTTrainer` first
trains it on demonstrations of the family, which takes minutes on two cores. One step in five of a demonstration is
wrong, and the rest follows from it. So the model learns to solve the task and to slip, and training has something to
improve.

A run stops when it has decoded its tokens. A token that several leaves share counts once, as the engine decodes it
once. Held-out reward is that of independent completions at temperature 1 for every trainer. Each run is a process of
its own. Finished runs are not repeated.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import reasoning_gym
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks.common import (
    OUTPUTS,
    ProcessFailed,
    device_name,
    make_parser,
    run_to_log,
    table_head,
    table_row,
)
from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.quickstart import answer_reward


ARMS = {
    "independent, GRPO": None,
    "tree, grpo": {"advantage_estimator": "grpo"},
    "tree, treepo": {"advantage_estimator": "treepo"},
    "tree, treepo_segment": {"advantage_estimator": "treepo_segment"},
    "tree, value_difference": {"advantage_estimator": "value_difference"},
    "tree, leave_one_out": {"advantage_estimator": "leave_one_out", "leaf_weighting": "inverse_branching"},
}
WARM_START = "warm start"
SLIPS = 0.2  # of a demonstration's steps, which goes on with the wrong result
Slip = Callable[[], int]


def gcd(entry: dict, slip: Slip) -> tuple[str, str]:
    """`96,64` and Euclid's `96%64=32 64%32=0 32`."""
    a, b = entry["metadata"]["numbers"]
    short, steps = f"{a},{b}", []
    while b:
        rest = (a % b + slip()) % b
        steps.append(f"{a}%{b}={rest}")
        a, b = b, rest
    return short, " ".join([*steps, str(a)])


def products(entry: dict, slip: Slip) -> tuple[str, str]:
    """`47*38` and `47*30=1410 47*8=376 1410+376=1786`."""
    a, b = map(int, entry["metadata"]["expression"].split(" * "))
    tens, units = a * (b - b % 10) + slip(), a * (b % 10) + slip()
    total = tens + units + slip()
    return f"{a}*{b}", f"{a}*{b - b % 10}={tens} {a}*{b % 10}={units} {tens}+{units}={total}"


# Short form and worked solution, options of the task.
TASKS = {
    "products": (products, {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
    "gcd": (gcd, {"min_numbers": 2, "max_numbers": 2, "min_value": 10, "max_value": 100}),
}


def task_rows(task: str, size: int, seed: int) -> list[dict]:
    """Question for people, its short form, a demonstration that slips now and then, and the answer."""
    worked, options = TASKS[task]
    rng = random.Random(seed)
    rows = []
    for entry in reasoning_gym.create_dataset(task, size=size, seed=seed, **options):
        short, demonstration = worked(entry, lambda: rng.randint(1, 9) if rng.random() < SLIPS else 0)
        rows.append(
            {"question": entry["question"], "short": short, "solution": demonstration, "answer": entry["answer"]}
        )
    return rows


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character of the short tasks."""
    vocabulary = ["<eos>", "<pad>", "<unk>", *"0123456789+-*%=, \n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # no space between characters
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def warm_start(task: str, folder: Path, steps: int) -> None:
    """Train the small Llama on demonstrations: it learns the task and to slip as often as they do."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        eos_token_id=tokenizer.get_vocab()["<eos>"],
        pad_token_id=tokenizer.get_vocab()["<pad>"],
        bos_token_id=None,
    )
    rows = task_rows(task, 64 * steps, seed=1)
    args = SFTConfig(
        output_dir=str(folder.with_name(folder.name + "-sft")),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": r["short"] + "\n", "completion": r["solution"]} for r in rows]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


class TokenBudget(TrainerCallback):
    """Counts decoded tokens, asks for an evaluation at equal distances, and stops when they are used up."""

    def __init__(self, budget: int, completions: int, num_points: int) -> None:
        self.budget, self.completions, self.every = budget, completions, budget / num_points
        self.tokens = 0.0
        self.curve: list[dict] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Take tokens from a training step's log and the reward from an evaluation's."""
        logs = logs or {}
        if "eval_reward" in logs:
            self.curve.append({"tokens": self.tokens, "reward": logs["eval_reward"], "step": state.global_step})
        elif "reward" in logs:
            before = self.tokens // self.every
            self.tokens += logs.get("tree/decoded_tokens", self.completions * logs["completions/mean_length"])
            control.should_evaluate = self.tokens // self.every > before
            control.should_training_stop = self.tokens >= self.budget


def settings(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every trainer gets."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": 100_000,  # the callback stops
        "per_device_train_batch_size": options.prompts * options.width,
        "per_device_eval_batch_size": options.held_out * 4,
        "num_generations_eval": 4,
        "num_generations": options.width,
        "max_completion_length": options.max_completion_length,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,  # Adam's first steps have the size of the learning rate, however noisy the gradient
        "scale_rewards": "batch",
        "epsilon_high": 0.28,
        "eval_strategy": "no",
        "eval_on_start": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "use_vllm": options.use_vllm,
        "model_init_kwargs": {"dtype": options.dtype},
    }


def prompts_of(rows: list[dict], is_small: bool) -> Dataset:
    """Prompts and answers: the short form for the small model, a conversation for a real one."""
    prompts = [r["short"] + "\n" if is_small else [{"role": "user", "content": r["question"]}] for r in rows]
    return Dataset.from_list(
        [{"prompt": prompt, "answer": row["answer"]} for prompt, row in zip(prompts, rows, strict=True)]
    )


def train(arm: str, task: str, seed: int, options: argparse.Namespace, folder: Path) -> None:
    """One run; writes `result.json`."""
    tree = ARMS[arm]
    values = settings(seed, options, folder)
    trainer_class: Any = GRPOTrainer if tree is None else TreePOTrainer
    if tree is None:
        args = GRPOConfig(**values)
    else:
        args = TreePOConfig(segment_length=options.segment_length, **tree, **values)
    budget = TokenBudget(options.tokens, options.prompts * options.width, options.points)
    is_small = options.model is None
    trainer = trainer_class(
        model=str(run_folder(WARM_START, task, 0, options)) if is_small else options.model,
        reward_funcs=answer_reward,
        args=args,
        train_dataset=prompts_of(task_rows(task, 4096, seed=100 + seed), is_small),
        eval_dataset=prompts_of(task_rows(task, options.held_out, seed=2), is_small),
        callbacks=[budget],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    result = {
        "arm": arm,
        "task": task,
        "seed": seed,
        "device": device_name(),
        "curve": budget.curve,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "log": [log for log in trainer.state.log_history if "reward" in log],
    }
    (folder / "result.json").write_text(json.dumps(result))


def start(name: str, task: str, seed: int, options: argparse.Namespace, result: str = "result.json") -> Path:
    """Folder of one run, which runs in a process of its own if its result is not there yet."""
    folder = run_folder(name, task, seed, options)
    if not (folder / result).exists():
        command = ["-m", "benchmarks.learning", *sys.argv[1:], "--run", name, task, str(seed)]
        threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
        try:
            run_to_log(command, folder / "log.txt", OMP_NUM_THREADS=threads)
        except ProcessFailed as error:
            raise SystemExit(f"{task} {name} seed {seed} failed: {error}") from None
        print(f"{task} {name} seed {seed} done", file=sys.stderr, flush=True)
    return folder


def run_folder(name: str, task: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run keeps its files."""
    return options.out / f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def print_table(task: str, runs: dict[str, list[dict]], budget: int) -> None:
    """Held-out reward of each arm at fractions of the budget, mean and standard deviation over seeds."""
    points = [budget * quarter / 4 for quarter in range(5)]
    first = next(iter(runs.values()))[0]
    print(f"\n`{task}`, {first['device']}, {len(next(iter(runs.values())))} seeds\n")
    print(table_head("arm", *(f"{point / 1000:.0f}k" for point in points), "mean of the curve", "steps"))
    for arm, results in runs.items():
        curves = np.array([interpolate(result, points) for result in results])
        means = np.array([interpolate(result, np.linspace(0, budget, 101)).mean() for result in results])
        freedom = min(1, len(results) - 1)
        cells = [f"{column.mean():.3f} ± {column.std(ddof=freedom):.3f}" for column in [*curves.T, means]]
        print(table_row(arm, *cells, f"{np.mean([result['steps'] for result in results]):.0f}"))


def interpolate(result: dict, tokens: Sequence[float] | np.ndarray) -> np.ndarray:
    """Held-out reward of a run at these numbers of decoded tokens, on lines between its evaluations."""
    curve = result["curve"]
    return np.interp(tokens, [point["tokens"] for point in curve], [point["reward"] for point in curve])


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
    figure.savefig(file, dpi=100)
    print(f"\n{file}", file=sys.stderr)


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="a chat model; without it the small one with a warm start")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--use_vllm", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300_000, help="decoded tokens of a run")
    parser.add_argument("--points", type=int, default=6, help="evaluations of a run")
    parser.add_argument("--held_out", type=int, default=128, help="tasks of an evaluation, four completions each")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--width", type=int, default=8, help="completions per prompt")
    parser.add_argument("--max_completion_length", type=int, default=64)
    parser.add_argument("--segment_length", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--warm_steps", type=int, default=500, help="of the small model on demonstrations")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "learning")
    parser.add_argument("--plot", type=Path, default=OUTPUTS / "learning/learning.png")
    parser.add_argument("--run", nargs=3, metavar=("ARM", "TASK", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_all(options: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """Results of all seeds by task and arm; runs what is missing."""
    runs = [(arm, task, seed) for seed in range(options.seeds) for task in options.tasks for arm in options.arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.model is None:
            list(pool.map(lambda task: start(WARM_START, task, 0, options, "config.json"), options.tasks))
        folders = list(pool.map(lambda run: start(run[0], run[1], run[2], options), runs))
    by_run = {run: json.loads((folder / "result.json").read_text()) for run, folder in zip(runs, folders, strict=True)}
    return {
        task: {arm: [by_run[arm, task, seed] for seed in range(options.seeds)] for arm in options.arms}
        for task in options.tasks
    }


def main() -> None:
    """Run what is missing, print the table and draw the plot; with `--run`, one run in this process."""
    options = parse_options()
    if options.run:
        name, task, seed = options.run
        folder = run_folder(name, task, int(seed), options)
        if name == WARM_START:
            warm_start(task, folder, options.warm_steps)
        else:
            train(name, task, int(seed), options, folder)
        return
    by_task = run_all(options)
    for task, arms in by_task.items():
        print_table(task, arms, options.tokens)
    draw(by_task, options.tokens, options.plot)


if __name__ == "__main__":
    main()
