"""
Peak memory of full steps of a recipe (rollout, scoring, update): stock TRL, and this package's ways to hold the base.

    python -m benchmarks.memory --card_gib 12                                       # the 1.5B recipe, on a GPU
    python -m benchmarks.memory --recipe qwen2.5-7b-qlora-24gb --architecture qwen2.5-7b --card_gib 24
    python -m benchmarks.memory --architecture smollm2-135m --length 64 --trees 1   # that the script works, on a CPU

The model has random weights of the architecture. Its settings are the recipe's, but for the batch: `--trees` trees of
`--leaves` leaves and at most `--length` tokens, one tree per micro-batch. Stock TRL forwards `--rows` rows at a time.
With `--as_it_stands` the batch is the recipe's too. Each way runs in a process of its own.

On CUDA the process may take `--card_gib`, however much the card has: torch gets that limit, and the engine its share
of it. A way whose engine sleeps has no such limit, since torch goes on counting what a sleeping engine has given back.
Its peaks alone tell whether it fits.

Memory is looked at every few milliseconds in each part of a step. On CUDA it is that of the whole device, context
included. On a CPU it is the resident memory of the process, in which vLLM's cache counts as far as it was touched.
"planned" is what `treepo-trl plan` says. Prints a Markdown table; a way that fails has its error there.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from benchmarks.common import (
    OUTPUTS,
    ROOT,
    ProcessFailed,
    device_name,
    make_parser,
    number_type,
    option_arguments,
    print_result,
    result_of,
    table_head,
    table_row,
)
from benchmarks.random_models import MODELS, random_checkpoint
from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.command_line import arguments as command_arguments
from treepo_trl.memory import plan_memory


GIB = 2**30
SLEEPS: dict[str, object] = {"vllm_enable_sleep_mode": True}
WAYS: dict[str, dict[str, object]] = {
    "stock TRL": {},
    "stock TRL, engine sleeps": SLEEPS,
    "treepo": {},
    "treepo, engine sleeps": SLEEPS,
    "treepo, engine sleeps, weights stay": {**SLEEPS, "vllm_sleep_keeps_weights": True},
    "treepo, shared base": {"vllm_share_base_weights": True},
    "treepo, shared base, engine sleeps": {**SLEEPS, "vllm_share_base_weights": True},
}
PARTS = ("loading", "rollout", "scoring", "update")
PASSED_ON = ("recipe", "architecture", "engine", "card_gib", "leaves", "length", "trees", "rows", "steps", "seed")
"""Options that the process of a way gets."""


class Measured(TypedDict):
    """What one way took."""

    peaks: dict[str, float]
    """GiB of each part of a step."""
    planned: float | None
    """GiB that the planner says; not for stock TRL."""
    seconds: list[float]
    """Of each step."""
    device: str


def has_sleeping_engine(way: str) -> bool:
    """Whether the engine gives its memory back during the update."""
    return SLEEPS.items() <= WAYS[way].items()


class PeakMemory:
    """Highest memory in use in each part of the work, looked at by a thread."""

    def __init__(self, interval: float = 0.003) -> None:
        self.part = "loading"
        self.peaks: dict[str, int] = dict.fromkeys(PARTS, 0)
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What is in use in this block counts for `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def wrap(self, owner: object, name: str, part: str) -> None:
        """Let each call of a method count for `part`."""
        method: Callable[..., object] = getattr(owner, name)

        @wraps(method)
        def measured(*args: object, **kwargs: object) -> object:
            with self.during(part):
                return method(*args, **kwargs)

        setattr(owner, name, measured)

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            part = self.part
            self.peaks[part] = max(self.peaks[part], used_bytes())


def used_bytes() -> int:
    """Memory in use: of the device with all that is on it, or of this process on a CPU."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    with open("/proc/self/statm") as file:
        return 4096 * int(file.read().split()[1])


def parse_recipe(way: str, options: argparse.Namespace, model: str) -> tuple[TreePOConfig, ModelConfig]:
    """The recipe's arguments of training and model, with the batch and the way of this benchmark."""
    changes = {
        "model_name_or_path": model,
        "output_dir": OUTPUTS / "memory",
        "max_steps": options.steps,
        "seed": options.seed,
        "save_strategy": "no",
        "report_to": "none",
        "use_vllm": options.engine == "vllm",
        **({} if options.as_it_stands else batch_of(way, options)),
        **WAYS[way],
    }
    dtype, precision = number_type()
    if not torch.cuda.is_available():
        changes |= {"use_cpu": True, "bf16": False, "optim": "adamw_torch"}
    elif dtype == "float16":
        changes |= {"dtype": dtype, **precision}
    arguments = ["--config", str(ROOT / f"examples/cli_configs/{options.recipe}.yaml")]
    for name, value in changes.items():
        arguments += [f"--{name}", str(value)]
    parser = command_arguments.make_parser()
    _, training_args, model_args, _ = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    return cast(TreePOConfig, training_args), cast(ModelConfig, model_args)


def batch_of(way: str, options: argparse.Namespace) -> dict[str, object]:
    """The batch of this benchmark."""
    rows = options.rows if way.startswith("stock") else options.leaves
    return {
        "num_generations": options.leaves,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": options.trees * options.leaves // rows,
        "max_completion_length": options.length,
        "segment_length": -(-options.length // 14),
        "vllm_max_model_length": options.length + 512,
    }


def stock_config(config: TreePOConfig) -> GRPOConfig:
    """The settings that stock TRL has too."""
    names = GRPOConfig.__dataclass_fields__.keys() - {
        "generation_batch_size",
        "distributed_state",
    }  # follow from these
    return GRPOConfig(**{name: value for name, value in vars(config).items() if name in names and value is not None})


def build(way: str, config: TreePOConfig, model_args: ModelConfig) -> GRPOTrainer:
    """A trainer of TRL or of this package."""
    is_stock = way.startswith("stock")
    trainer_class: Any = GRPOTrainer if is_stock else TreePOTrainer
    training_args = stock_config(config) if is_stock else config
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    prompts = [tokenizer.decode(range(1000 + i, 1128 + i)) for i in range(64)]  # 128 tokens of `random_checkpoint`
    return trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=lambda completion_ids, **_: [float(ids[-1] % 2) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def planned_gib(training_args: TreePOConfig, model_args: ModelConfig, options: argparse.Namespace) -> float:
    """What the planner says of these arguments on the card of `--card_gib`."""
    plan = plan_memory(MODELS[options.architecture], training_args, model_args, options.card_gib * GIB)
    return max(plan.rollout, plan.update) / GIB


def measure(way: str, options: argparse.Namespace, model: str) -> Measured:
    """Peaks of each part in GiB, and seconds of each step."""
    training_args, model_args = parse_recipe(way, options, model)
    planned = None if way.startswith("stock") else planned_gib(training_args, model_args, options)
    if torch.cuda.is_available():
        fraction = options.card_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        training_args.vllm_gpu_memory_utilization *= fraction  # of this card, as much as of the smaller one
        if not has_sleeping_engine(way):
            torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0))
    with PeakMemory() as memory:
        trainer = build(way, training_args, model_args)
        memory.wrap(trainer, "training_step", "update")
        memory.wrap(trainer, "_generate_and_score_completions", "scoring")
        memory.wrap(trainer, "_generate", "rollout")
        started: list[float] = []
        inner = trainer.training_step

        def step(*args: Any, **kwargs: Any) -> torch.Tensor:
            started.append(time.perf_counter())
            return inner(*args, **kwargs)

        trainer.training_step = step
        with memory.during("update"):  # the optimizer's step too
            trainer.train()
        begun = [*started[:: training_args.gradient_accumulation_steps], time.perf_counter()]
    peaks = {part: peak / GIB for part, peak in memory.peaks.items()}
    seconds = [after - before for before, after in pairwise(begun)]
    return {"peaks": peaks, "planned": planned, "seconds": seconds, "device": device_name()}


def run(way: str, options: argparse.Namespace, model: str) -> Measured | ProcessFailed:
    """Measure a way in a process of its own; its figures, or why it ended."""
    arguments = ["--only", way, "--model_folder", model, *option_arguments(options, PASSED_ON)]
    arguments += ["--as_it_stands"] if options.as_it_stands else []
    try:
        return cast(Measured, result_of("benchmarks.memory", arguments))
    except ProcessFailed as error:
        return error


def report(way: str, result: Measured | ProcessFailed, card: float) -> None:
    """Print a row of the table."""
    if isinstance(result, ProcessFailed):
        print(table_row(way, *["-"] * (len(PARTS) + 1), result), flush=True)
        return
    peaks = result["peaks"]
    fits = "yes" if max(peaks.values()) <= card or not torch.cuda.is_available() else "no"
    planned = "-" if result["planned"] is None else f"{result['planned']:.1f}"
    cells = [f"{peaks[part]:.2f}" for part in PARTS]
    print(table_row(way, *cells, planned, f"{fits}, {result['seconds'][-1]:.1f} s"), flush=True)


def write_checkpoint(architecture: str, folder: str) -> None:
    """Write random weights in another process: a CUDA context in this one would count in every peak."""
    writer = multiprocessing.get_context("spawn").Process(target=random_checkpoint, args=(architecture, Path(folder)))
    writer.start()
    writer.join()


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, of the command line if none are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="qwen2.5-1.5b-lora-12gb", help="a file in examples/cli_configs")
    parser.add_argument("--architecture", default="qwen2.5-1.5b", choices=MODELS)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--card_gib", type=float, default=12, help="memory that the process may take on CUDA")
    parser.add_argument("--leaves", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="max_completion_length")
    parser.add_argument("--trees", type=int, default=2, help="per step")
    parser.add_argument("--rows", type=int, default=1, help="rows per micro-batch of stock TRL")
    parser.add_argument(
        "--as_it_stands", action="store_true", help="the recipe's batch; without leaves, length, trees"
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="all; on a CPU those whose engine does not sleep")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model_folder", help="checkpoint to use; random weights are written without it")
    return parser.parse_args(arguments)


def main() -> None:
    """Run every way and print a row of each."""
    options = parse_options()
    if options.only:
        print_result(measure(options.only, options, options.model_folder))
        return
    print(f"{options.recipe} on {options.architecture}, a card of {options.card_gib:g} GiB: ", end="")
    batch = f"{options.trees} trees of {options.leaves} leaves, {options.length} tokens each at most"
    print(f"{'the batch of the recipe' if options.as_it_stands else batch}. Peaks in GiB.\n")
    print(table_head("way", *PARTS, "planned", "fits, s of the last step"), flush=True)
    devices = set()
    with tempfile.TemporaryDirectory() as folder:
        if not options.model_folder:
            write_checkpoint(options.architecture, folder)
        on_cuda = torch.cuda.is_available()
        for way in options.ways or [way for way in WAYS if on_cuda or not has_sleeping_engine(way)]:
            result = run(way, options, options.model_folder or folder)
            report(way, result, options.card_gib)
            if not isinstance(result, ProcessFailed):
                devices.add(result["device"])
    print(f"\nDevice: {', '.join(devices) or 'unknown, every way failed'}")


if __name__ == "__main__":
    main()
