"""Groups of checks in child processes: what ends a process or keeps its memory ends or keeps no other check's."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from .findings import Finding, last_line
from .needs import Needs


_TIMEOUT = 300  # seconds for a group; both together were seen to take 100 on two shared processor cores


def run_group(group: str, names: Sequence[str], needs: Needs) -> list[Finding]:
    """
    Findings of the checks of one group, each of which has one, whatever becomes of the process.

    Args:
        group (`str`):
            Name of the group, as `child.py` knows it.
        names (`Sequence[str]`):
            Its checks in their order.
        needs ([`Needs`]):
            What is to be checked.
    """
    with tempfile.TemporaryDirectory(prefix="treepo-trl-doctor-") as scratch:
        results, said = Path(scratch) / "results.jsonl", Path(scratch) / "said.txt"
        results.touch()
        command = [sys.executable, "-m", "treepo_trl.doctor.child", group, json.dumps(asdict(needs)), str(results)]
        with said.open("w") as output:
            end = _wait(command, output)
        records = [json.loads(line) for line in results.read_text().splitlines()]
        found = [Finding(**record) for record in records]
        return found + _without_finding(names[len(found) :], end, said)


def _wait(command: list[str], output: IO[str]) -> str:
    """Run to the end, or to the limit of time; how it ended, in words."""
    environment = {
        **os.environ,
        # The engine's steps run in the child itself, as in training.
        "VLLM_ENABLE_V1_MULTIPROCESSING": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        # A training that runs on this machine may have the default one.
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port()),
    }
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
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


def _load_of_others() -> str:
    """Says so if more threads were waiting for a processor than the child itself has."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 2 * processors:
        return ""
    return f"The machine is busy, with a load of {load:.1f} on {processors} processors"


def _without_finding(names: Sequence[str], end: str, said: Path) -> list[Finding]:
    """Findings of the checks that have left none: the process has ended in the first of them, or before it."""
    if not names:
        return []
    cause = f"the process {end} in this check. Its last line: {last_line(said.read_text(errors='replace'))}"
    others = _load_of_others() if str(_TIMEOUT) in end else ""
    if others:
        first = Finding(names[0], "cannot run", f"the process {end} in this check. {others}: run it again when idle")
    else:
        remedy = "Look for this line in the issues of the library that it names."
        first = Finding(names[0], "broken", cause, remedy)
    return [first, *(Finding(name, "cannot run", f"its process {end} before this check") for name in names[1:])]
