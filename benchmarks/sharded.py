"""
Steps of a LoRA training with trees in several processes, each of which says what it saw.

    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml --num_processes 2 -m benchmarks.sharded
    torchrun --nproc_per_node 2 -m benchmarks.sharded --leaves 4 --length 16  # on a processor

The settings are those of the 1.5B recipe, with one tree of `--leaves` leaves a process and step, and without pieces of
micro-batches, which FSDP and DeepSpeed refuse. vLLM samples in the processes, on a processor the transformers engine.

Each process prints a line: seconds of each step, the GiB that torch has reserved at most, with those of the engine
(on a processor resident memory), losses, and the largest weight of the adapter's B, which begins at zero.
"""

import json
import os
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import TrainerCallback

from benchmarks import memory
from benchmarks.common import make_parser, print_result, small_model_folder
from treepo_trl.apps.doctor.findings import in_words
from treepo_trl.policy.gathered_adapter import gathered_adapter


class Measured(TypedDict):
    """What one process saw."""

    seconds: list[float]
    """Of each step."""
    gib: float
    """At most, as `peak_bytes` says."""
    losses: list[float]
    """Of each step."""
    largest_b: float
    """Largest weight of the adapter's B, which begins at zero."""


class StepTimes(TrainerCallback):
    """Seconds of each step, with the work that it has left to the card."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """A step begins with its sampling."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        """The optimizer has stepped."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def build(options: Namespace) -> Any:
    """The trainer of this process."""
    engine = "vllm" if torch.cuda.is_available() else "transformers"
    batch = {"leaves": options.leaves, "length": options.length, "trees": 1, "steps": options.steps, "engine": engine}
    given = memory.parse_options([word for name, value in batch.items() for word in (f"--{name}", str(value))])
    config, model_args = memory.parse_recipe("treepo", given, options.model or small_model_folder())
    config.max_tokens_per_micro_batch = None
    config.logging_nan_inf_filter = False  # it would hide a loss that is not finite
    return memory.build("treepo", config, model_args)


def train(trainer: Any) -> Measured:
    """Train, together with the other processes."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    weights = gathered_adapter(trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator)
    trainer.accelerator.wait_for_everyone()
    return {
        "seconds": times.seconds,
        "gib": peak_bytes() / memory.GIB,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "largest_b": max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name),
    }


def peak_bytes() -> int:
    """Memory of this process at most: of its card, or resident memory on a processor."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def parse_options() -> Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="hub id or folder; default: the small model that comes with packages")
    parser.add_argument("--leaves", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="max_completion_length")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="write `rank0` and so on there, or `failed0` with the error")
    return parser.parse_args()


def main() -> None:
    """Train and say what was seen."""
    options, rank = parse_options(), os.environ.get("RANK", "0")
    try:
        measured = train(build(options))
    except Exception as error:
        if options.folder:
            (options.folder / f"failed{rank}").write_text(in_words(error))
        raise
    if options.folder:
        (options.folder / f"rank{rank}").write_text(json.dumps(measured))
    else:
        print_result(measured)
    sys.stdout.flush()
    os._exit(0)  # an engine may hang when the interpreter takes it apart


if __name__ == "__main__":
    main()
