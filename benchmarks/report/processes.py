"""
Cases in processes of their own, with a limit of time.

A card's memory is given back when a process ends, and what ends one process ends no other case. On a card a process
starts from nothing. At toy size it is forked from one that has loaded the libraries, which saves most of the time.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Required, TypedDict, cast

import psutil

from benchmarks.common import OUTPUTS
from treepo_trl.apps.doctor.findings import CannotRunError, in_words, last_line

from .cases import Case, as_cell


CHECKPOINTS = OUTPUTS / "gpu_report/checkpoints"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing here needs the hub
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's steps run in the process of the case, as in training
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, on processors alone
}
_LOOK = 1.0  # seconds between two looks at what a process has started
_PRELOADED = ["peft", "datasets", "treepo_trl.treepo_trainer", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"]


class Outcome(TypedDict, total=False):
    """What became of a case."""

    rows: Required[dict[str, list[float | str]]]
    """Values of each row in the order in which they came; also those from before a failure."""
    seconds: float
    failed: str
    """Why it ended early: the last line of the error."""
    cannot_run: str
    """Why this machine cannot show it."""
    timed_out: bool


class Processes:
    """Starts the processes of a report."""

    def __init__(self, logs: Path, smoke: bool) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.logs = logs
        # Libraries that were loaded before a fork may have touched a card, which the fork then cannot use.
        forks = smoke and shutil.which("nvidia-smi") is None
        self._context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(_PRELOADED)

    def run(self, case: Case, log_name: str, limit: float) -> Outcome:
        """Run a case, with its checkpoint if that is not written yet, for `limit` seconds at most."""
        started = time.monotonic()
        arguments = dict(case.arguments)
        if case.architecture is not None:
            folder = CHECKPOINTS / case.architecture
            if not (folder / "config.json").exists():
                written = self._run(_write_checkpoint, {"name": case.architecture, "folder": folder}, log_name, limit)
                if "failed" in written:
                    return written
            arguments["model"] = str(folder)
        outcome = self._run(case.run, arguments, log_name, limit - (time.monotonic() - started))
        outcome["seconds"] = round(time.monotonic() - started, 1)
        return outcome

    def _run(self, function: Any, arguments: dict[str, Any], log_name: str, limit: float) -> Outcome:
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{log_name}.txt"
        with tempfile.TemporaryDirectory(prefix="gpu-report-") as scratch:
            results = Path(scratch) / "results.jsonl"
            results.touch()
            process = self._context.Process(target=_child, args=(function, arguments, results, log))
            process.start()
            end = time.monotonic() + max(limit, 0.0)
            started: set[psutil.Process] = set()
            try:
                while True:  # a process that is killed can no longer be asked what it has started
                    started |= _descendants(cast(int, process.pid))
                    process.join(min(max(end - time.monotonic(), 0.0), _LOOK))
                    if not process.is_alive() or time.monotonic() >= end:
                        break
                exit_code = process.exitcode
            finally:
                started |= _descendants(cast(int, process.pid))
                with suppress(ProcessLookupError):  # the child's session: itself, and most of what it has started
                    os.killpg(cast(int, process.pid), signal.SIGKILL)
                for each in started:  # servers and the processes of a launcher have sessions of their own
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                process.kill()  # if it has not come as far as a session of its own
                process.join()
            return _outcome(results, log, exit_code, limit)


def _descendants(pid: int) -> set[psutil.Process]:
    """What a process has started that is still there, and what that has started."""
    with suppress(psutil.NoSuchProcess):
        return set(psutil.Process(pid).children(recursive=True))
    return set()


def _child(function: Any, arguments: dict[str, Any], results: Path, log: Path) -> None:
    """Run a function in this process; its rows and its end go to `results`, what it prints to `log`."""
    os.setsid()
    with log.open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    with results.open("a") as file:

        def write(**line: object) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        try:
            function(record=lambda row, value: write(row=row, value=_as_json(value)), **arguments)
            write(end="done")
        except CannotRunError as error:
            write(cannot_run=str(error))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            write(failed=as_cell(in_words(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written, and an engine may hang when the interpreter takes it apart


def _as_json(value: float | str) -> float | str:
    """A number, or a text; what is not finite is a text, since it has no place in a median."""
    if isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else str(float(value))


def _outcome(results: Path, log: Path, exit_code: int | None, limit: float) -> Outcome:
    outcome: Outcome = {"rows": {}}
    has_ended = False
    for text in results.read_text().splitlines():
        line = json.loads(text)
        if "row" in line:
            outcome["rows"].setdefault(line["row"], []).append(line["value"])
        else:
            has_ended = True
            outcome.update({name: value for name, value in line.items() if name != "end"})  # type: ignore[typeddict-item]
    if not has_ended and exit_code is None:
        outcome.update(failed=f"not done after {limit:.0f} s", timed_out=True)
    elif not has_ended:
        said = as_cell(last_line(log.read_text(errors="replace"))) if log.exists() else "no message"
        outcome["failed"] = f"its process ended with status {exit_code}; its last line: {said}"
    return outcome


def _write_checkpoint(record: Any, name: str, folder: Path) -> None:  # noqa: ARG001
    """Random weights of an architecture, with the tokenizer of the small model that comes with packages."""
    from transformers import AutoTokenizer

    from benchmarks.common import small_model_folder
    from benchmarks.random_models import random_checkpoint

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # an interrupted run leaves no half checkpoint
        target = Path(scratch) / name
        random_checkpoint(name, target, AutoTokenizer.from_pretrained(small_model_folder()))
        target.rename(folder)
