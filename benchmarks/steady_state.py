"""
What a training holds after 20 steps and after 200: open files, threads, shared memory, resident memory.

    python -m benchmarks.steady_state                # a tiny model, sampled with transformers
    python -m benchmarks.steady_state --engine vllm  # a LoRA adapter, which vLLM gets at each step
    python -m benchmarks.steady_state --at 10 40     # a quick look

One process trains, with dynamic sampling, a tree log, and a checkpoint at every fifth step. At the end of each step it
counts what it holds, and prints the most of ten steps. Transformers keeps all that was logged, which is no leak:
`--logging_steps 1000` leaves it out. Prints a Markdown table.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.common import make_parser, table_head, table_row
from tests.support.models import make_model, make_tokenizer
from tests.support.trainers import labelled, reward_by_kind
from treepo_trl import TreePOConfig, TreePOTrainer


WINDOW = 10  # steps whose largest figure counts: a file may be open at the end of one step and not of the next


def memory_of_process() -> dict[str, float]:
    """Fields of `/proc/self/status` in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) / 1024 for name, value, _ in fields}


def shared_files() -> list[Path]:
    """Files in shared memory that this process maps, or that lie in a folder with its id in the name."""
    mapped = {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if " /dev/shm/" in line}
    owned = {str(path) for path in Path("/dev/shm").glob(f"*-{os.getpid()}-*/*")}
    return [Path(name) for name in mapped | owned if Path(name).is_file()]


def held() -> dict[str, float]:
    """What the process holds now."""
    shared = shared_files()
    memory = memory_of_process()
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "files in shared memory": len(shared),
        "shared memory, MiB": sum(path.stat().st_size for path in shared) / 2**20,
        "resident memory, MiB": memory["VmRSS"],
        "resident memory at its peak so far, MiB": memory["VmHWM"],
    }


class Watch(TrainerCallback):
    """Keeps what each step held when it ended."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.steps.append(held())

    def most(self, name: str, step: int) -> float:
        """The largest figure of the steps that end with this one."""
        return max(figures[name] for figures in self.steps[max(step - WINDOW, 0) : step])


def train(folder: Path, options: argparse.Namespace) -> Watch:
    """A training with all that leaves something behind at a step."""
    model = str(folder / "model")
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    on_vllm: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": 128,
    }
    args = TreePOConfig(
        output_dir=str(folder / "run"),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to=[],
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=24,
        segment_length=8,
        max_steps=options.at[-1],
        logging_steps=options.logging_steps,
        disable_tqdm=True,
        dynamic_sampling_rounds=2,
        log_trees=True,
        save_steps=5,
        save_total_limit=2,
        gradient_checkpointing=False,
        **(on_vllm if options.engine == "vllm" else {}),
    )
    watch = Watch()
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = TreePOTrainer(
        model=model,
        args=args,
        reward_funcs=reward_by_kind,
        train_dataset=labelled("cvvcvcvvccvvcv"),
        processing_class=make_tokenizer(),
        peft_config=adapter if options.engine == "vllm" else None,
        callbacks=[watch],
    )
    trainer.train()
    return watch


def main() -> None:
    """Print a row for each thing that is held."""
    parser = make_parser(__doc__)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--at", type=int, nargs="+", default=[20, 200], help="steps to compare, in order")
    parser.add_argument("--logging_steps", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        watch = train(Path(folder), options)
    print(f"\nTiny model, {options.engine}\n")
    print(table_head("held", *(f"step {step}" for step in options.at)))
    for name in watch.steps[0]:
        print(table_row(name, *(f"{watch.most(name, step):.1f}" for step in options.at)))


if __name__ == "__main__":
    main()
