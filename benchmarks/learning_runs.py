"""What benchmarks beside `benchmarks.learning` share: runs on its `gcd` task and model, each a process and a file."""

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from datasets import Dataset

from benchmarks import learning
from benchmarks.common import OUTPUTS, device_name, make_parser, run_to_log
from benchmarks.learning import HeldOutReward, TokenBudget
from treepo_trl import TreePOTrainer


Run = TypeVar("Run", bound=tuple)


def runs_parser(description: str | None) -> argparse.ArgumentParser:
    """Options that these benchmarks have in common, and those of `benchmarks.learning` as they are there."""
    parser = make_parser(description)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--tokens", type=int, default=150_000, help="decoded tokens of a run")
    parser.add_argument("--points", type=int, default=6, help="measurements of a run")
    parser.add_argument("--held_out", type=int, default=128, help="tasks of a measurement")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "learning", help="where the warm start is, or will be")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.set_defaults(model=None, dtype="float32", use_vllm=False, completions=128, warm_steps=800)
    return parser


def train_and_write(trainer: TreePOTrainer, held_out: Dataset, options: argparse.Namespace, folder: Path) -> None:
    """Train until the tokens are used up, and write `result.json`."""
    measure = HeldOutReward(held_out, trainer.processing_class, trainer.args.max_completion_length)
    budget = TokenBudget(options.tokens, options.points, measure)
    trainer.add_callback(budget)
    trainer.train()
    log = [each for each in trainer.state.log_history if "reward" in each]
    result = {"device": device_name(), "curve": budget.curve, "steps": trainer.state.global_step, "log": log}
    (folder / "result.json").write_text(json.dumps(result))


def results_of(
    module: str, runs: Sequence[Run], folder_of: Callable[[Run], Path], options: argparse.Namespace
) -> dict[Run, dict]:
    """Results of runs by their two words; a run that is not there yet runs in a process of its own."""
    warm = options.out / f"gcd-{learning.WARM_START}"
    if not (warm / "config.json").exists():
        learning.warm_start("gcd", warm, options.warm_steps)

    def result(run: Run) -> dict:
        file = folder_of(run) / "result.json"
        if not file.exists():
            command = ["-m", module, "--out", str(options.out), "--tokens", str(options.tokens)]
            command += ["--rate", str(options.rate), "--held_out", str(options.held_out)]
            command += ["--points", str(options.points), "--run", *map(str, run)]
            run_to_log(command, file.with_name("log.txt"), OMP_NUM_THREADS="1")
        return json.loads(file.read_text())

    with ThreadPoolExecutor(options.jobs) as pool:
        return dict(zip(runs, pool.map(result, runs), strict=True))
