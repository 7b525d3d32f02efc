"""Trainings in several processes, as `accelerate launch` starts them."""

import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import ROOT, ProcessFailed
from benchmarks.report.cases import Case, Record, Stage
from treepo_trl.apps.doctor.findings import CannotRunError


if TYPE_CHECKING:
    from benchmarks.sharded import Measured


WAYS = {"ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}
"""Files of `examples/accelerate_configs`, and what they start."""
OWN_MACHINE = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def steps(record: Record, model: str, way: str, options: list[str]) -> None:
    """Seconds of each step but the first, each process's peak, and whether anything was learned."""
    measured = launch(launcher(way), ["--model", model, *options])
    name, first = WAYS[way], measured[0]
    record(f"{name}: processes", len(measured))
    for value in first["seconds"][1:]:
        record(f"{name}: s per step", value)
    for process, each in enumerate(measured):
        record(f"{name}: GiB at most, process {process}", each["gib"])
    for loss in first["losses"]:
        record(f"{name}: loss", loss)
    record(f"{name}: largest weight of B, which began at 0", first["largest_b"])
    check_learned(measured)


def check_learned(measured: list["Measured"]) -> None:
    """Raise unless losses are finite and every process has the same adapter, which has moved."""
    losses = [loss for each in measured for loss in each["losses"]]
    if not losses or not all(map(math.isfinite, losses)):
        raise ProcessFailed(f"losses are not finite: {losses}")
    largest = [each["largest_b"] for each in measured]
    if not 0 < largest[0] < math.inf or set(largest) != {largest[0]}:
        raise ProcessFailed(f"the adapter did not move, or differs between processes: largest weights of B {largest}")


def launcher(way: str) -> list[str]:
    """
    The module that starts the processes, and its options: as many as cards, and two at most.

    Raises:
        CannotRunError: if this machine cannot start them.
    """
    import torch

    cards = torch.cuda.device_count()
    if way != "ddp" and not cards:
        raise CannotRunError(f"accelerate starts {WAYS[way]} on cards alone")
    if way == "zero3" and find_spec("deepspeed") is None:
        raise CannotRunError("ZeRO-3 needs the package deepspeed: `pip install deepspeed`")
    if not cards:  # accelerate launches a single process on processors
        return ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    file = ROOT / f"examples/accelerate_configs/{way}.yaml"
    port = ["--main_process_port", "0"]  # any that is free
    return ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(min(cards, 2)), *port]


def launch(launcher: list[str], options: list[str]) -> list["Measured"]:
    """
    What each process of `benchmarks.sharded` saw.

    Raises:
        ProcessFailed: if one fails; the message is the error of the first that did.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launcher, "--module", "benchmarks.sharded", "--folder", folder, *options]
        done = subprocess.run(command, env=OWN_MACHINE | os.environ, check=False)
        failed = sorted(Path(folder).glob("failed*"), key=lambda path: path.stat().st_mtime)
        if failed:
            raise ProcessFailed(failed[0].read_text())
        if done.returncode != 0:
            raise ProcessFailed(f"{launcher[0]} ended with status {done.returncode}")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*"))]


def cases(smoke: bool) -> list[Case]:
    """Each way, in a process of its own that launches the others."""
    toy = ["--leaves", "4", "--length", "8", "--steps", "2"]
    given = {"options": toy if smoke else ["--leaves", "8", "--length", "512", "--steps", "3"]}
    return [Case(way, steps, {"way": way, **given}, "tiny" if smoke else "qwen2.5-1.5b") for way in WAYS]


SHARDED = Stage(
    name="sharded",
    title="DDP, FSDP2 and ZeRO-3",
    about="""\
Steps of the 1.5B LoRA recipe with one tree of 8 leaves of at most 512 tokens a process (`benchmarks.sharded`). Each
way is launched with its file in `examples/accelerate_configs`, a process for each card and at most two. vLLM samples
in the processes. GiB are what torch reserves, with the engine's part. The first step is left out.""",
    cases=cases,
)
