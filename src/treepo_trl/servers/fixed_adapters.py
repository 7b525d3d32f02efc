"""vLLM servers as an engine of a model that is not trained, with adapters that are not either."""

import asyncio
import atexit
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

from treepo_trl.engines import SamplingOptions

from .checks import ServerNeeds
from .connection import ServerConnection, ServerLostError, ServerRefusedError, run_in_loop
from .engine import VLLMServerEngine
from .fleet import Fleet
from .versions import LOAD_TIMEOUT, ServedPolicy


_OWN_WEIGHTS = "default"  # as vLLM calls those that it has started with
_UNLOAD_SECONDS = 5.0


class FixedAdapters(ServedPolicy):
    """
    Adapters that stay as they are, on servers with the weights that they were started with.

    Args:
        adapters (sequence of `str`):
            Folders or hub ids.

    Attributes:
        names (`list[str]`):
            What requests ask for, unlike the adapters of anybody else on the same servers.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        run = uuid.uuid4().hex[:8]
        self._paths = [os.path.abspath(path) if os.path.isdir(path) else path for path in adapters]
        self._adapters = adapters
        self.names = [f"treepo-{run}-adapter-{i}" for i in range(len(adapters))]

    async def load(self, server: ServerConnection) -> None:
        await self._check_base(server)
        loaded = await server.models()
        for name, path, adapter in zip(self.names, self._paths, self._adapters, strict=True):
            if name not in loaded:
                await self._load(server, name, path, adapter)

    async def _check_base(self, server: ServerConnection) -> None:
        """Raise for a server that a training has given its weights: they stand under the name of the base."""
        with suppress(ServerRefusedError):  # older than 0.27; no training with all weights takes such a server
            version = (await server.get("/weight_info"))["weight_version"]
            if version != _OWN_WEIGHTS:
                raise ValueError(
                    f"The vLLM server at {server.url} has the weights of a training ({version}) in place of its "
                    "model's. Start it again."
                )

    async def _load(self, server: ServerConnection, name: str, path: str, adapter: str) -> None:
        try:
            await server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, LOAD_TIMEOUT)
        except (ServerLostError, ServerRefusedError) as error:
            if isinstance(error, ServerLostError) and not await server.has_answered(error):
                raise
            reason = error.body if isinstance(error, ServerRefusedError) else error
            raise ValueError(
                f"The vLLM server at {server.url} could not load the adapter {adapter}: {reason} It reads the folder "
                "itself: put it where the server finds it under the same path. It needs "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
            ) from error

    async def unload(self, servers: list[ServerConnection]) -> None:
        """Let servers forget the adapters."""
        questions = (
            server.post("/v1/unload_lora_adapter", {"lora_name": name}, _UNLOAD_SECONDS)
            for server in servers
            for name in self.names
        )
        await asyncio.gather(*questions, return_exceptions=True)


class ServedAdapters(VLLMServerEngine):
    """
    [`VLLMServerEngine`] that samples with one of several adapters, or without any.

    Attributes:
        base (`str`):
            Name of the model without an adapter.
        adapters (`list[str]`):
            Names of the adapters on the servers.
    """

    base: str
    adapters: Sequence[str] = ()

    def use(self, position: int | None) -> None:
        """Sample with the adapter at this position; `None` for the model alone."""
        self.fleet.model = self.base if position is None else self.adapters[position]


def server_engine(
    urls: list[str],
    timeout: float,
    needs: ServerNeeds,
    eos_ids: list[int],
    options: SamplingOptions,
    adapters: Sequence[str],
) -> ServedAdapters:
    """
    An engine over servers, each checked; it samples with the first adapter, if there is one.

    Args:
        urls (`list[str]`):
            Addresses of the servers.
        timeout (`float`):
            Seconds, as for a [`Fleet`].
        needs ([`ServerNeeds`]):
            What each server must be, besides what adapters ask for.
        eos_ids (`list[int]`), options ([`SamplingOptions`]):
            As for a [`VLLMServerEngine`].
        adapters (sequence of `str`):
            Folders or hub ids of adapters.

    Raises:
        ValueError: for a server that is not up in time, or does not fit, naming the flag to start it with.
    """
    rank = max(map(_rank_of, adapters), default=0)
    policy = FixedAdapters(adapters)
    fleet = Fleet(urls, replace(needs, num_adapters=min(len(adapters), 1), adapter_rank=rank), policy, timeout)
    fleet.distribute()
    engine = ServedAdapters(fleet, eos_ids, options, with_entropies=needs.with_entropies)
    engine.base, engine.adapters = fleet.model, policy.names
    engine.use(0 if adapters else None)
    connections = [server.connection for server in fleet.servers]
    atexit.register(lambda: run_in_loop(policy.unload(connections)))
    return engine


def _rank_of(adapter: str) -> int:
    from peft import LoraConfig, PeftConfig

    return cast(LoraConfig, PeftConfig.from_pretrained(adapter)).r
