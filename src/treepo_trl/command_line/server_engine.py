"""vLLM servers as the engine of `treepo-trl sample` and `eval`."""

import atexit
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from treepo_trl.engines import SamplingOptions
from treepo_trl.preflight import require_model
from treepo_trl.servers.connection import ServerConnection, ServerLostError, ServerRefusedError
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.settings import server_urls

from .engine_arguments import EngineArguments


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_OWN_WEIGHTS = "default"  # as vLLM calls those that it has started with


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
        self.model = self.base if position is None else self.adapters[position]


def server_engine(
    arguments: EngineArguments,
    tokenizer: "PreTrainedTokenizerBase",
    eos_ids: list[int],
    options: SamplingOptions,
    with_entropies: bool,
    adapters: Sequence[str],
) -> VLLMServerEngine:
    """
    An engine over the servers that `arguments` name, each checked; it samples with the first adapter, if there is one.

    Raises:
        ValueError: for a server that is not up in time, or does not fit, naming the flag to start it with.
    """
    from treepo_trl.servers.checks import ServerNeeds, check_server
    from treepo_trl.servers.policy_servers import wait_for_server

    timeout = arguments.vllm_server_timeout
    servers = [ServerConnection(url, timeout) for url in server_urls(arguments.vllm_server_base_url, "", 0)]
    rank = max(map(_rank_of, adapters), default=0)
    needs = ServerNeeds(
        require_model(arguments.model_name_or_path),
        tokenizer,
        with_entropies=with_entropies,
        num_adapters=min(len(adapters), 1),
        adapter_rank=rank,
    )
    run = uuid.uuid4().hex[:8]
    names = [f"treepo-{run}-adapter-{i}" for i in range(len(adapters))]

    def admit(server: ServerConnection) -> None:
        check_server(server, needs)
        _check_base(server)
        loaded = {model.id for model in server.models()}
        for name, path in zip(names, adapters, strict=True):
            if name not in loaded:
                _load(server, name, path)

    for server in servers:
        wait_for_server(server, timeout)
        admit(server)
    engine = ServedAdapters(
        servers, eos_ids, options, with_entropies=with_entropies, timeout=timeout, on_connect=admit
    )
    engine.base, engine.adapters = engine.model, names
    engine.use(0 if names else None)
    atexit.register(_unload, servers, names)
    return engine


def _rank_of(adapter: str) -> int:
    from peft import LoraConfig, PeftConfig

    return cast(LoraConfig, PeftConfig.from_pretrained(adapter)).r


def _check_base(server: ServerConnection) -> None:
    """Raise for a server that a training has given its weights: they stand under the name of the base."""
    with suppress(ServerRefusedError):  # older than 0.27; no training with all weights takes such a server
        version = server.get("/weight_info")["weight_version"]
        if version != _OWN_WEIGHTS:
            raise ValueError(
                f"The vLLM server at {server.url} has the weights of a training ({version}) in place of its model's. "
                "Start it again."
            )


def _load(server: ServerConnection, name: str, adapter: str) -> None:
    from treepo_trl.servers.versions import LOAD_TIMEOUT

    path = os.path.abspath(adapter) if os.path.isdir(adapter) else adapter
    try:
        server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, LOAD_TIMEOUT)
    except (ServerLostError, ServerRefusedError) as error:
        if isinstance(error, ServerLostError) and not server.has_answered(error):
            raise
        reason = error.body if isinstance(error, ServerRefusedError) else error
        raise ValueError(
            f"The vLLM server at {server.url} could not load the adapter {adapter}: {reason} It reads the folder "
            "itself: put it where the server finds it under the same path. It needs "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
        ) from error


def _unload(servers: list[ServerConnection], names: list[str]) -> None:
    for server in servers:
        for name in names:
            with suppress(ServerLostError, ServerRefusedError):
                server.post("/v1/unload_lora_adapter", {"lora_name": name}, 5.0)
