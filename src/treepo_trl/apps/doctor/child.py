"""The small step in a child process: what ends it, hangs in it or keeps its memory leaves the report alone."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from .environment import installed_as
from .findings import Finding, last_line
from .recipe import Recipe


_TIMEOUT = 300  # seconds; it was seen to take 100 on two shared processor cores


def step_names(recipe: Recipe) -> list[str]:
    """The checks of the child, in their order; a recipe's step has the recipe's 4-bit layers in it."""
    return ["engine", "small step", *([] if recipe.is_given else ["4-bit"])]


def run_step(recipe: Recipe) -> list[Finding]:
    """Findings of the child's checks, each of which has one, whatever becomes of the process."""
    names = step_names(recipe)
    needed = {"vllm": recipe.uses_vllm, "peft": recipe.has_adapter}
    absent = [package for package, is_needed in needed.items() if is_needed and installed_as(package) is None]
    if absent:
        return [Finding(name, "cannot run", f"{' and '.join(absent)} not installed: see versions") for name in names]
    with tempfile.TemporaryDirectory(prefix="treepo-trl-doctor-") as scratch:
        given, results, said = (Path(scratch, name) for name in ("recipe.pickle", "results.jsonl", "said.txt"))
        given.write_bytes(pickle.dumps(recipe))
        results.touch()
        command = [sys.executable, "-m", "treepo_trl.apps.doctor.step", str(given), str(results)]
        with said.open("w") as output:
            end = _wait(command, output)
        found = [Finding(**json.loads(line)) for line in results.read_text().splitlines()]
        return found + _without_finding(names[len(found) :], end, said)


def _wait(command: list[str], output: IO[str]) -> str:
    """Run to the end, or to the limit of time; how it ended, in words."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's steps run in the child itself, as in training
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "MASTER_PORT": str(_free_port()),  # a training that runs on this machine may have the default one
    }
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=defaults | os.environ, start_new_session=True
    )
    try:
        status = process.wait(_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"was ended after {_TIMEOUT} seconds"
    finally:
        with suppress(ProcessLookupError):  # the session that was started here: the child, and what vLLM started in it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _without_finding(names: list[str], end: str, said: Path) -> list[Finding]:
    """Findings of the checks that have left none: the process has ended in the first of them, or before it."""
    if not names:
        return []
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if str(_TIMEOUT) in end and load > 2 * processors:  # others than the child were waiting for a processor
        busy = f"The machine is busy, with a load of {load:.1f} on {processors} processors: run it again when idle"
        first = Finding(names[0], "cannot run", f"the process {end} in this check. {busy}")
    else:
        cause = f"the process {end} in this check. Its last line: {last_line(said.read_text(errors='replace'))}"
        first = Finding(names[0], "broken", cause, "Look for this line in the issues of the library that it names.")
    return [first, *(Finding(name, "cannot run", f"its process {end} before this check") for name in names[1:])]
