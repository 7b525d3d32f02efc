"""
All weights of a policy, sent from this process's card to those of the servers over NCCL.

TRL's client does it, with one NCCL group for each server. What is here is the order for several servers, and what
happens when one of them fails: the weights are gathered once, in pieces, and each piece goes to every server before
the next is gathered. A broadcast waits for its receiver for ever. So whoever waits looks after the server.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from trl.generation.vllm_client import VLLMClient
from trl.import_utils import is_vllm_available

from treepo_trl.engines.server_connection import ServerConnection, ServerLostError, ServerRefusedError, http_loop

from .weights import LOAD_TIMEOUT, WeightVersions


_BYTES_PER_PIECE = 2**29  # what the card holds of gathered weights at a time; the client packs a copy of it
_LOOK = 5.0  # seconds between two looks after a server that is waited for
_DEAD_LOOKS = 3  # in a row: one alone may be a machine that is busy
_FAREWELL = 30.0  # seconds for a request of a training that ends


class TransferError(RuntimeError):
    """Weights that a server did not get, by its fault or by one of this side."""


_LOST = (ServerLostError, ServerRefusedError, TransferError, ValueError, KeyError, TypeError)
"""What a server that is not there, or another than before, answers with."""


def can_send(device: torch.device) -> bool:
    """Whether weights go from this device over NCCL. vLLM before 0.29 would lose memory with each piece."""
    return device.type == "cuda" and is_vllm_available(min_version="0.29.0")


class _Client(VLLMClient):
    """TRL's client over a connection that sends nothing twice, has a deadline, and can be left."""

    def __init__(self, server: ServerConnection, group_port: int) -> None:
        self.server = server
        self._asked: Future[Any] | None = None
        super().__init__(server.url, group_port=group_port)
        self._updating_weights = True  # `SentWeights` begins and ends an update

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Nothing is left to check; TRL calls this before its first request."""

    def get_server_info(self) -> dict[str, Any]:
        return self._get("/server_info?config_format=json")["vllm_config"]

    def _get(self, url: str, **kwargs: Any) -> Any:
        return self.server.get(url.removeprefix(self.server.url))

    def _post(self, url: str, **kwargs: Any) -> dict[str, Any]:
        """Only begin a request: TRL waits for this also where its own side has failed, and then nobody answers."""
        path, body = url.removeprefix(self.server.url), kwargs.get("json")
        self._asked = asyncio.run_coroutine_threadsafe(
            self.server.ask("POST", path, body, timeout=LOAD_TIMEOUT), http_loop()
        )
        return {}

    def wait(self) -> None:
        """Wait until the server is through with the last request; raises what it was refused with."""
        if self._asked is not None:
            self._asked.result()

    @property
    def refusal(self) -> BaseException | None:
        """Why the last request has failed, if it has: TRL looks only when its side of the transfer is through."""
        asked = self._asked
        return asked.exception() if asked is not None and asked.done() and not asked.cancelled() else None

    def leave(self) -> None:
        """Give up what is under way, and the group."""
        if self._asked is not None:
            self._asked.cancel()
        if self.communicator is not None:
            self.communicator.destroy()
        self.close_communicator()


class SentWeights(WeightVersions):
    """
    All weights, without folders: a server that was started anew gets them after the next update.

    Args:
        folder (`str`), run (`str`):
            As for [`WeightVersions`]; nothing is written.
        device (`torch.device`):
            That the weights are sent from.
        group_port (`int`):
            The first port to try for a group.
        check (`Callable`):
            Raises unless a server that comes back is what it was.
    """

    def __init__(
        self,
        folder: str,
        run: str,
        device: torch.device,
        group_port: int,
        check: Callable[[ServerConnection], None],
    ) -> None:
        super().__init__(folder, run)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # other threads begin with the first card
        self._device, self._next_port, self._check = device, group_port, check
        self._clients: dict[ServerConnection, _Client] = {}
        self._failed: dict[ServerConnection, tuple[int, int]] = {}  # groups in a row, and updates to leave out

    def connect(self, servers: Iterable[ServerConnection]) -> None:
        """
        Open a group with each server, before anything is sent.

        Raises:
            TransferError: if one takes no part.
            ServerLostError: if one cannot be reached.
        """
        for server in servers:
            self._client_of(server)

    def load(self, server: ServerConnection) -> None:
        if self.name not in self._loaded(server):
            raise ServerLostError(f"{server.url} gets the policy with a later update: it has missed the last one.")

    def take(
        self, step: int, weights: Iterator[tuple[str, torch.Tensor]], servers: Iterable[ServerConnection]
    ) -> dict[ServerConnection, Exception]:
        name = self._new_name(step)
        clients: dict[ServerConnection, _Client] = {}  # of servers that wait for weights
        lost: dict[ServerConnection, Exception] = {}  # servers that are not to sample
        try:
            self._prepare(servers, clients, lost)
            for piece in _pieces(weights, self._device):
                for client in clients.values():
                    self._while_it_lives(client, partial(_send, client, piece))
                piece.clear()  # before the next is gathered
            for server in clients:
                with self._noting(server, lost):
                    server.post("/finish_weight_update", {}, LOAD_TIMEOUT)
                    server.post("/update_weight_version", {"new_version": name})
        except BaseException:
            for server in clients:
                _end_update(server)
            raise
        self._add(step, name)
        for server in clients:
            _resume(server)
        return lost

    @contextmanager
    def _noting(self, server: ServerConnection, lost: dict[ServerConnection, Exception]) -> Iterator[None]:
        """Note what a server has failed at; before the first version that is an error."""
        try:
            yield
        except _LOST as error:
            if not self.names:
                raise
            lost[server] = error

    def _prepare(
        self,
        servers: Iterable[ServerConnection],
        clients: dict[ServerConnection, _Client],
        lost: dict[ServerConnection, Exception],
    ) -> None:
        """Let the servers wait for weights; they generate no more. Groups are opened before any of them stops."""
        groups: dict[ServerConnection, _Client] = {}
        for server in servers:
            before = self._clients.get(server)
            with self._noting(server, lost):
                groups[server] = self._client_of(server)
                if self.names and groups[server] is not before:
                    lost[server] = ServerLostError(f"{server.url} was started anew. It is probed before it samples.")
        for server, client in groups.items():
            with self._noting(server, lost):
                _start_update(server)
                clients[server] = client

    def _client_of(self, server: ServerConnection) -> _Client:
        """The client with this server's group, which ends with the server: then a new one."""
        client = self._clients.get(server)
        if client is not None and self._is_of_this_run(server):
            return client
        if client is not None:
            self._clients.pop(server).leave()
        if client is not None or self.names:
            self._check(server)
        way = server.facts().weight_transfer
        if way != "nccl":
            raise TransferError(f"{server.url} was started with weight transfer over {way}, and before over nccl.")
        client = self._clients[server] = self._open(server)
        server.post("/update_weight_version", {"new_version": f"{self._prefix}group"})  # a restart forgets it
        return client

    def _open(self, server: ServerConnection) -> _Client:
        """A client with a new group. Each try may hold up all others for ten minutes: failures make them rarer."""
        num_failed, num_left_out = self._failed.get(server, (0, 0))
        if num_left_out:
            self._failed[server] = num_failed, num_left_out - 1
            raise ServerLostError(
                f"{server.url} is left out of this update: one in {2**num_failed} tries it, since its group over NCCL "
                "did not open."
            )
        client = _Client(server, _free_port(self._next_port))
        self._next_port = client.group_port + 1
        num_failed = min(num_failed + 1, 4)
        self._failed[server] = num_failed, 2**num_failed - 1  # unless it opens now
        self._while_it_lives(client, partial(client.init_communicator, self._device))
        del self._failed[server]
        return client

    def _is_of_this_run(self, server: ServerConnection) -> bool:
        return any(name.startswith(self._prefix) for name in self._loaded(server))

    def _while_it_lives(self, client: _Client, work: Callable[[], None]) -> None:
        """
        Do what ends only if a server takes part, and leave it when the server has failed.

        Raises:
            TransferError: if it has died, has refused, or takes longer than for a whole model; or if this side fails.
        """
        done = Future[None]()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                work()  # ends with an error of this side at once, though the server waits on
                done.set_result(client.wait())
            except Exception as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        dead, end = 0, time.monotonic() + LOAD_TIMEOUT + 2 * _LOOK  # then the request has ended, and says why
        while not wait([done], _LOOK).done and dead < _DEAD_LOOKS and not client.refusal and time.monotonic() < end:
            dead = 0 if client.server.is_healthy() else dead + 1
        wait([done], _LOOK if client.refusal else 0.0)
        error = done.exception() if done.done() else client.refusal
        if error is None and done.done():
            return
        client.leave()
        self._clients.pop(client.server, None)
        reason = "it does not answer" if error is None else str(error).rstrip(".")
        raise TransferError(
            f"The policy's weights did not reach the vLLM server at {client.server.url} over NCCL: {reason}. Each "
            "process needs a card of its own, and a way to the others; `NCCL_DEBUG=INFO` says more. If the servers "
            "start without `--weight-transfer-config`, weights go through a folder."
        ) from error


def _pieces(
    weights: Iterator[tuple[str, torch.Tensor]], device: torch.device
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Copies of weights in order, some at a time: the tensors of a sharded model are gone with the next."""
    piece: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if piece and size + tensor.nbytes > _BYTES_PER_PIECE:
            yield piece
            piece, size = [], 0
        piece.append((name, tensor.detach().to(device, copy=True).contiguous()))
        size += tensor.nbytes
    if piece:
        yield piece


def _send(client: VLLMClient, piece: list[tuple[str, torch.Tensor]]) -> None:
    if piece[0][1].is_cuda:
        torch.cuda.synchronize(piece[0][1].device)  # the client reads the copies in streams of its own
    metadata = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in piece]
    client.update_named_params(metadata, iter(piece))


def _start_update(server: ServerConnection) -> None:
    """Pause a server and let it wait for weights, also where a killed training has not ended its update."""
    try:
        server.post("/pause?mode=wait")  # which also empties the prefix cache
        try:
            server.post("/start_weight_update", {}, LOAD_TIMEOUT)
        except ServerLostError as error:
            if error.status is None:  # it has not refused
                raise
            with suppress(*_LOST):
                server.post("/finish_weight_update", {}, LOAD_TIMEOUT)
            server.post("/start_weight_update", {}, LOAD_TIMEOUT)
    except _LOST:
        _end_update(server)  # a pause that it has not answered may have begun
        raise


def _end_update(server: ServerConnection) -> None:
    """Leave a server in a state that a training can begin from."""
    with suppress(*_LOST):
        server.post("/finish_weight_update", {}, _FAREWELL)
    _resume(server)


def _resume(server: ServerConnection) -> None:
    with suppress(*_LOST):
        server.post("/resume", timeout=_FAREWELL)


def _free_port(first: int) -> int:
    """The first port from `first` on that nobody listens on."""
    for port in range(first, 2**16):
        with socket.socket() as each, suppress(OSError):
            each.bind(("", port))
            return port
    raise ValueError(f"No port from `vllm_group_port` ({first}) on is free. Set a lower one.")
