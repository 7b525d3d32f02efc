"""What the benchmarks share. Importing this loads no model library, so that `benchmarks.house` needs none."""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


ROOT = Path(__file__).parent.parent
OUTPUTS = Path("outputs/benchmarks")
RESULT = "result: "
"""What the line begins with on which a process of its own hands back its result."""


class ProcessFailed(Exception):
    """A process of a benchmark ended with an error; the message is the end of what it printed, on one line."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the first sentence of the script's docstring."""
    return argparse.ArgumentParser(description=inspect.cleandoc(description or "").split("\n")[0])


def print_result(result: object) -> None:
    """Hand a result back to the process that has called [`result_of`]."""
    print(RESULT + json.dumps(result), flush=True)


def result_of(module: str, arguments: Iterable[str]) -> object:
    """
    What `python -m module` hands back through [`print_result`], run in a process of its own.

    Raises:
        ProcessFailed: if the process fails or hands nothing back.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1].removeprefix(RESULT))
    _, found, message = done.stderr.rpartition("Error")
    text = f"Error{message}" if found else f"exit status {done.returncode} {done.stderr[-160:]}"
    raise ProcessFailed(" ".join(text.split()).replace("|", "/")[:160])


def run_to_log(command: Sequence[str], log: Path, **environment: str) -> None:
    """
    Run `python` with these arguments in a process of its own and write what it prints to `log`.

    Raises:
        ProcessFailed: if the process fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            check=False,
        )
    if done.returncode != 0:
        raise ProcessFailed(f"exit status {done.returncode}: see {log}")


def option_arguments(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """These options as they are written on a command line."""
    return [word for name in names for word in (f"--{name}", str(getattr(options, name)))]


def device_name() -> str:
    """Name of the GPU, or `CPU`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def small_model_folder() -> str:
    """Folder of SmolLM2-135M-Instruct, which the quickstart and the tests use too."""
    from treepo_trl.quickstart import small_model

    return small_model(ROOT / ".cache/smollm2-135m-instruct")


def number_type() -> tuple[str, dict[str, bool]]:
    """Type of the weights, and the settings of mixed precision: float16 on a card that has no bfloat16."""
    import torch

    if not torch.cuda.is_available():
        return "bfloat16", {"bf16": False}
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", {"bf16": True}
    return "float16", {"bf16": False, "fp16": True}


def nf4_config() -> "BitsAndBytesConfig":
    """QLoRA's 4-bit weights: NF4, quantized constants, arithmetic in 16 bits."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, number_type()[0]),
    )


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call, with the work that it has left to the GPU."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """`median (lowest to highest)`."""
    low, mid, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{mid} ({low} to {high})"


def table_row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*names: object) -> str:
    """The first two lines of a Markdown table."""
    return f"{table_row(*names)}\n|{'---|' * len(names)}"
