"""
The quickstart with TreePO and with stock GRPO: held-out accuracy, tokens and seconds per step over several seeds.

    python -m benchmarks.quickstart                     # three seeds of each, alternating; CPU or GPU
    python -m benchmarks.quickstart --seeds 1 --steps 5  # a quick look
    python -m benchmarks.quickstart --seeds 1 --steps 6 --trainers treepo treepo_plain  # what the packed update saves

`treepo_plain` is TreePO with `tree_packing="off"`. Each run is `treepo-trl quickstart` in a process of its own.
Finished runs are not repeated. Options that this script does not know go to the runs. Prints a Markdown table: tokens
are those that the engine sampled for a step, and a step's seconds hold sampling, rewards and update.
"""

import json
import statistics
import sys
from pathlib import Path

from benchmarks.common import OUTPUTS, make_parser, run_to_log, table_head, table_row


OPTIONS: dict[str, list[str]] = {
    "treepo": [],
    "treepo_plain": ["--tree_packing", "off"],
    "grpo": ["--stock_grpo", "true", "--log_trees", "false"],
}


def run(trainer: str, seed: int, steps: int, out: Path, extra: list[str]) -> dict:
    """Result of one run, from its file if it is there."""
    folder = out / f"{trainer}-{seed}"
    result = folder / "quickstart.json"
    if not result.exists():
        command = ["-m", "treepo_trl.cli", "quickstart", "--output_dir", str(folder)]
        command += ["--seed", str(seed), "--max_steps", str(steps), *extra]
        command += OPTIONS[trainer]
        run_to_log(command, folder / "log.txt")
    return json.loads(result.read_text())


def sampled_tokens(step: dict, completions: int) -> float:
    """Tokens that the engine sampled in a step."""
    return step.get("tree/decoded_tokens", completions * step["completions/mean_length"])


def main() -> None:
    """Run what is missing and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--completions", type=int, default=64, help="completions per step, as in the recipe")
    parser.add_argument("--trainers", nargs="+", default=["treepo", "grpo"], choices=OPTIONS)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "quickstart")
    args, extra = parser.parse_known_args()
    runs: dict[str, list[dict]] = {trainer: [] for trainer in args.trainers}
    for seed in range(42, 42 + args.seeds):
        for trainer in args.trainers:
            runs[trainer].append(run(trainer, seed, args.steps, args.out, extra))
            print(f"{trainer} seed {seed} done", file=sys.stderr)
    first = runs[args.trainers[0]][0]
    print(f"{first['device']}, {first['dtype']}, {first['engine']} engine, {args.steps} steps\n")
    names = "trainer", "accuracy before -> after, each seed", "mean gain", "tokens per step", "s per step", "s total"
    print(table_head(*names))
    for trainer, results in runs.items():
        pairs = ", ".join(f"{r['accuracy_before']:.1%} -> {r['accuracy_after']:.1%}" for r in results)
        gain = statistics.mean(r["accuracy_after"] - r["accuracy_before"] for r in results)
        steps = [step for r in results for step in r["steps"][1:]]  # the first step pays for warm-up
        tokens = statistics.median(sampled_tokens(step, args.completions) for step in steps)
        seconds = statistics.median(step["step_time"] for step in steps)
        total = statistics.median(r["train_seconds"] for r in results)
        print(table_row(trainer, pairs, f"{gain:+.1%}", f"{tokens:.0f}", f"{seconds:.2f}", f"{total:.0f}"))


if __name__ == "__main__":
    main()
