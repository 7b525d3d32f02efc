"""
All weights of a policy, sent from this process's card to those of the servers over NCCL.

TRL's client does it, with one NCCL group for each server. What is here is the order for several servers: the weights
are gathered once, in pieces, and each piece goes to every server before the next is gathered. A broadcast cannot be
left once it has begun, so whoever waits for one looks after the server, and gives up when that has died.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeVar

import torch
from trl.generation.vllm_client import VLLMClient

from treepo_trl.engines.server_connection import ServerConnection, ServerLostError, ServerRefusedError

from .weights import LOAD_TIMEOUT, WeightVersions


Result = TypeVar("Result")

_BYTES_PER_PIECE = 2**29  # what the card holds of gathered weights at a time
_LOOK = 5.0  # seconds between two looks after a server that is waited for
_DEAD_LOOKS = 3  # in a row: one alone may be a machine that is busy


def can_send(device: torch.device) -> bool:
    """Whether NCCL reaches this process's device."""
    return device.type == "cuda"


class _Client(VLLMClient):
    """TRL's client of a server that has been checked: with what its address holds, and without proxies."""

    def __init__(self, server: ServerConnection, group_port: int) -> None:
        self._server = server
        super().__init__(server.url, group_port=group_port)
        self._updating_weights = True  # `SentWeights` says when an update begins and ends: it waits with a deadline

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Nothing is left to check; TRL calls this before its first request."""
        self.session.headers.update(self._server.headers)
        self.session.trust_env = False


class SentWeights(WeightVersions):
    """
    All weights, without folders: a server that was started anew gets them after the next update.

    Args:
        folder (`str`), run (`str`):
            As for [`WeightVersions`]. Nothing is written.
        device (`torch.device`):
            That the weights are sent from.
        group_port (`int`):
            Of the first group; each further group takes the next one.
    """

    def __init__(self, folder: str, run: str, device: torch.device, group_port: int) -> None:
        super().__init__(folder, run)
        self._device, self._next_port = device, group_port
        self._clients: dict[ServerConnection, _Client] = {}

    def load(self, server: ServerConnection) -> None:
        if self.name not in self._loaded(server):
            raise ServerLostError(f"{server.url} was started anew: it gets the policy after the next update.")

    def take(
        self, step: int, weights: Iterator[tuple[str, torch.Tensor]], servers: Iterable[ServerConnection]
    ) -> dict[ServerConnection, Exception]:
        name, lost = self._new_name(step), dict[ServerConnection, Exception]()
        clients: dict[ServerConnection, _Client] = {}
        for server in servers:
            try:
                clients[server], is_new = self._client_of(server)
                server.post("/pause?mode=wait")  # which also empties the prefix cache
                server.post("/start_weight_update", {}, LOAD_TIMEOUT)
            except (ServerLostError, ServerRefusedError) as error:
                clients.pop(server, None)
                lost[server] = error
                continue
            if is_new and self.names:
                lost[server] = ServerLostError(f"{server.url} was started anew. It is checked before it samples.")
        for piece in _pieces(weights, self._device):
            for server, client in clients.items():
                self._while_it_lives(server, partial(_send, client, piece))
        for server in clients:
            try:
                server.post("/finish_weight_update", {}, LOAD_TIMEOUT)
                server.post("/update_weight_version", {"new_version": name})
                server.post("/resume")
            except (ServerLostError, ServerRefusedError) as error:
                lost[server] = error
        self._add(step, name)
        return lost

    def _client_of(self, server: ServerConnection) -> tuple[_Client, bool]:
        """The client with this server's group, and whether it is new: the group ends with the server."""
        if server in self._clients and self.name in self._loaded(server):
            return self._clients[server], False
        if server in self._clients:
            self._clients.pop(server).close_communicator()
        if server.facts().weight_transfer != "nccl":  # the first time that was checked
            raise ServerLostError(f"{server.url} was started anew without `--weight-transfer-config`.")
        self._clients[server] = self._while_it_lives(
            server, partial(_connected, server, self._next_port, self._device)
        )
        self._next_port += 1
        return self._clients[server], True

    def _while_it_lives(self, server: ServerConnection, work: Callable[[], Result]) -> Result:
        """
        The result of what ends only if a server takes part. It is given up when the server has died.

        Raises:
            RuntimeError: if it has died, or takes longer than for a whole model.
        """
        future = Future[Result]()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # each thread begins with the first one
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()  # no pool: a process waits for the threads of a pool
        dead, end = 0, time.monotonic() + LOAD_TIMEOUT
        while not wait([future], _LOOK).done and dead < _DEAD_LOOKS and time.monotonic() < end:
            dead = 0 if server.is_healthy() else dead + 1
        try:
            return future.result(timeout=0)
        except Exception as error:
            why = "it does not answer." if isinstance(error, TimeoutError) else str(error)
            raise RuntimeError(
                f"The vLLM server at {server.url} did not take the policy's weights over NCCL: {why} Start all "
                "servers anew, and resume from the last checkpoint. NCCL needs cards that no other process of its "
                "group has. Without `--weight-transfer-config` the weights go through a folder."
            ) from error


def _connected(server: ServerConnection, group_port: int, device: torch.device) -> _Client:
    """A client with its group, which the server opens at the same time."""
    client = _Client(server, group_port)
    client.init_communicator(device)
    return client


def _pieces(
    weights: Iterator[tuple[str, torch.Tensor]], device: torch.device
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Copies of weights in order, some at a time: the tensors of a sharded model are gone with the next."""
    piece: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        piece.append((name, tensor.detach().to(device, copy=True).contiguous()))
        size += tensor.nbytes
        if size > _BYTES_PER_PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _send(client: VLLMClient, piece: list[tuple[str, torch.Tensor]]) -> None:
    if piece[0][1].is_cuda:
        torch.cuda.synchronize(piece[0][1].device)  # the client reads the copies in streams of its own
    metadata = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in piece]
    client.update_named_params(metadata, iter(piece))
