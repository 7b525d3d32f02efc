"""Real vLLM servers on this machine: started, killed, started again, and stopped with everything they have started."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from treepo_trl.servers.connection import ServerConnection, run_in_loop


FLAGS = [
    *("--enable-scale-out", "--enable-prefix-caching", "--enable-prompt-tokens-details"),
    *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--disable-uvicorn-access-log"),
    *("--max-num-seqs", "32"),
]
CPU_FLAGS = ["--block-size", "32", "--enforce-eager"]
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # the first request would wait for a compiler
}
LORA_FLAGS = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "16"]


class VLLMServer:
    """
    `python -m vllm.entrypoints.openai.api_server` on a free port, in a session of its own.

    The module starts with `vllm-cpu` too; the command `vllm serve` wants the metadata of the package `vllm`.

    Args:
        model (`str`):
            Folder of the base.
        log (`Path`):
            File for what it prints.
        flags (`list[str]`, *optional*):
            Further flags, such as `LORA_FLAGS`.
        card (`str`, *optional*):
            The card that it sees, as `CUDA_VISIBLE_DEVICES` names it. Without one it is a server on a processor.
    """

    def __init__(self, model: str, log: Path, flags: list[str] | None = None, card: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        address = ["--model", model, "--host", "127.0.0.1", "--port", str(self.port)]
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self.command = [*module, *address, *FLAGS, *(CPU_FLAGS if card is None else []), *(flags or [])]
        self._place = CPU_ENVIRONMENT if card is None else {"CUDA_VISIBLE_DEVICES": card}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again on the same port. Returns at once; see `wait`."""
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # the tests set 0, for the engine in their own process
            **self._place,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self, seconds: float = 240.0) -> None:
        """Wait until it answers."""
        assert self.process is not None
        connection = ServerConnection(self.url)
        end = time.monotonic() + seconds
        while not run_in_loop(connection.is_healthy()):
            assert self.process.poll() is None, f"the server has ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"the server does not answer:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.25)

    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """`kill -9` of all its processes: that of the API alone would leave the engine running."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and after ten seconds `kill`."""
        self._end(signal.SIGTERM)
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, number)  # the session that was started above, and nothing else
        except ProcessLookupError:
            self.process.wait()
            return
        with suppress(subprocess.TimeoutExpired):  # SIGKILL follows
            self.process.wait(timeout=10)


@contextmanager
def vllm_servers(
    count: int, model: str, folder: Path, flags: list[str] | None = None, cards: Sequence[str | None] = (None,)
) -> Iterator[list[VLLMServer]]:
    """Some servers that start side by side, on these cards in turn, and end with the block."""
    places = [cards[i % len(cards)] for i in range(count)]
    servers = [VLLMServer(model, folder / f"server-{i}.log", flags, card) for i, card in enumerate(places)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()
