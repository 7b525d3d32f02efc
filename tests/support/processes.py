"""Scripts in two processes that know each other, as `torchrun` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT


def run_in_two_processes(script: str, folder: Path, *arguments: str, timeout: int = 300) -> list[dict[str, Any]]:
    """
    What each process of a script has written to `rank0.json` and `rank1.json` in `folder`.

    `accelerate launch --cpu --num_processes 2` starts one process; torchrun is what it uses with GPUs.
    """
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "ACCELERATE_USE_CPU": "true",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HOME": str(folder / "hf"),
    }
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the session that was started here: the launcher and its two processes
        output, _ = process.communicate()
        pytest.fail(f"the processes wait for each other:\n{output[-3000:]}")
    assert process.returncode == 0, output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
