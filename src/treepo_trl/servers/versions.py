"""
What vLLM servers are given to sample from: versions of a policy in folders, and how servers load them.

A version has a folder of its own, which appears under its name when all of it is written. vLLM's prefix cache knows
an adapter by name and folder, so states of an older one are never taken for its own. Loading in place under one name
would do just that.
"""

import asyncio
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from .connection import ServerConnection, ServerLostError, ServerRefusedError


LOAD_TIMEOUT = 600.0  # seconds until a server has all of a model
_QUESTION_TIMEOUT = 30.0  # seconds until an engine tells the version of its weights, between two of its steps
_BYTES_PER_FILE = 2**31  # of a model's weights: what the processor's memory holds of them at a time


class ServedPolicy(ABC):
    """What servers are given before they sample. Its coroutines run in `http_loop`."""

    name: str | None = None
    """The current version; `None` before the first, and where there are none."""
    model: str | None = None
    """What requests for it ask for; `None` for a server's own model."""

    @abstractmethod
    async def load(self, server: ServerConnection) -> None:
        """
        Give a server what it is to sample from, if it does not have it.

        Raises:
            ValueError: if it cannot, saying what to do.
            ServerLostError: if it cannot be reached, or gives no answer in time.
        """

    async def check_has(self, server: ServerConnection, name: str | None) -> None:
        """
        Raise unless a server has the version that it was given: that goes with a restart.

        Raises:
            ServerLostError: if it does not, or cannot be reached.
        """
        return

    async def remove_old(self, servers: Iterable[ServerConnection]) -> None:
        """Let the servers forget all but the last versions, and remove their folders."""
        return


class PolicyVersions(ServedPolicy):
    """
    The versions of one training's policy. Lives in the process that talks to the servers.

    Args:
        folder (`str`):
            Where the versions are written, which the servers can read.
        run (`str`):
            Name of the training, unlike that of any other on the same servers.

    Attributes:
        names (`list[str]`):
            Versions whose folders are there, the current one last.
    """

    kept = 1
    """Versions whose folders stay: a server that is started anew loads the current one."""

    def __init__(self, folder: str, run: str) -> None:
        self._folder = folder
        self._prefix = f"treepo-{run}-"  # of all names that this training gives
        self._num_written: Counter[int] = Counter()
        self.names: list[str] = []

    @property
    def name(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.names[-1] if self.names else None

    @property
    def path(self) -> str:
        """Folder of the current version."""
        return os.path.join(self._folder, self.names[-1])

    def write(self, step: int, write: Callable[[str], str]) -> None:
        """
        Write a new version, which is the current one from then on.

        Args:
            step (`int`):
                Of the training.
            write (`Callable`):
                Writes into a folder, and returns the one below it or itself that a server is to load.
        """
        again = self._num_written[step]  # a probe has several at one step
        name = f"{self._prefix}{step}" + (f".{again}" if again else "")
        being_written = os.path.join(self._folder, f".{name}")
        shutil.rmtree(being_written, ignore_errors=True)
        os.makedirs(being_written)
        written = write(being_written)
        _let_all_read(written)
        os.rename(written, os.path.join(self._folder, name))
        shutil.rmtree(being_written, ignore_errors=True)
        self._num_written[step] += 1
        self.names.append(name)

    async def load(self, server: ServerConnection) -> None:
        if self.names:
            name = self.names[-1]  # a new version may be written meanwhile
            await self._load(server, name, os.path.join(self._folder, name))

    async def check_has(self, server: ServerConnection, name: str | None) -> None:
        try:
            is_there = name is None or name in await self._loaded(server)
        except (ServerRefusedError, ValueError) as error:
            raise ServerLostError(f"{server.url} is another server than before: {error}") from error
        if not is_there:
            raise ServerLostError(f"{server.url} was started anew: it has lost the policy.")

    async def remove_old(self, servers: Iterable[ServerConnection]) -> None:
        servers = list(servers)
        while len(self.names) > self.kept:
            name = self.names.pop(0)
            for server in servers:
                with suppress(ServerLostError, ServerRefusedError):  # it was started anew since
                    await self._forget(server, name)
            await asyncio.to_thread(shutil.rmtree, os.path.join(self._folder, name), ignore_errors=True)

    @abstractmethod
    async def _load(self, server: ServerConnection, name: str, path: str) -> None:
        """Give a server the version in a folder; as `load`."""

    @abstractmethod
    async def _loaded(self, server: ServerConnection) -> Iterable[str]:
        """Names of what a server has now, of other trainings too."""

    async def _forget(self, server: ServerConnection, name: str) -> None:
        """Let a server forget a version."""

    def _unreadable(self, server: ServerConnection, path: str, answer: str) -> ValueError:
        return ValueError(
            f"The vLLM server at {server.url} could not load {path}: {answer} Set `vllm_server_adapter_dir` to a "
            "folder that training and servers share: /dev/shm on one machine, a shared disk on several."
        )


class AdapterVersions(PolicyVersions):
    """LoRA adapters: each version has a name on the servers too."""

    kept = 2  # a request of the version before may still run

    @property
    def model(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.name

    async def _loaded(self, server: ServerConnection) -> Iterable[str]:
        return await server.models()

    async def _load(self, server: ServerConnection, name: str, path: str) -> None:
        try:
            await server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, LOAD_TIMEOUT)
        except ServerLostError as error:
            if await server.has_answered(error):
                raise self._unreadable(server, path, str(error)) from error
            raise
        except ServerRefusedError as error:
            if (await server.models()).get(name) == path:
                return  # it has this version already
            if error.status == 404 and "Not Found" in error.body:  # no such endpoint, unlike a folder not found
                raise ValueError(
                    f"The vLLM server at {server.url} loads no adapters while it runs. Start it with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
                ) from error
            raise self._unreadable(server, path, error.body) from error

    async def _forget(self, server: ServerConnection, name: str) -> None:
        await server.post("/v1/unload_lora_adapter", {"lora_name": name})


class WeightVersions(PolicyVersions):
    """All weights: a server puts them in the place of its own."""

    async def _loaded(self, server: ServerConnection) -> Iterable[str]:
        return [(await server.get("/weight_info", _QUESTION_TIMEOUT))["weight_version"]]

    async def _load(self, server: ServerConnection, name: str, path: str) -> None:
        if name in await self._loaded(server):
            await self._resume(server)  # it may not have heard that the last time
            return
        try:
            await server.post("/pause?mode=wait")  # which also empties the prefix cache
            await self._reload(server, path)
            await server.post("/update_weight_version", {"new_version": name})
        finally:
            await self._resume(server)

    async def _reload(self, server: ServerConnection, path: str) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": LOAD_TIMEOUT}
        try:
            await server.post("/collective_rpc", call, LOAD_TIMEOUT)
        except ServerLostError as error:
            if await server.has_answered(error):
                raise self._unreadable(server, path, f"{error} Restart it: its weights are gone.") from error
            raise

    async def _resume(self, server: ServerConnection) -> None:
        with suppress(ServerLostError):
            await server.post("/resume")


def _let_all_read(folder: str) -> None:
    """A server may run as another user, and safetensors writes files for their owner alone."""
    for place, _, files in os.walk(folder):
        os.chmod(place, 0o755)
        for file in files:
            os.chmod(os.path.join(place, file), 0o644)


def write_weights(weights: Iterator[tuple[str, torch.Tensor]], folder: str) -> str:
    """
    Write a model's weights in files of a few GiB, as transformers and vLLM read them.

    Args:
        weights (`Iterator`):
            Names as in the checkpoint, and whole tensors, each of which may be gone once the next is asked for.
        folder (`str`):
            Which is there.

    Returns:
        `str`: the folder.
    """
    held: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    size = 0

    def write() -> None:
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(held, os.path.join(folder, file), metadata={"format": "pt"})
        index.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in weights:
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += held[name].nbytes
        if size > _BYTES_PER_FILE:
            write()
            size = 0
    if held:
        write()
    # vLLM reads only files of this list, where there is one.
    Path(folder, "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
