"""Fake vLLM servers that are given a policy: adapters, weights, and a probe whose answer depends on them."""

import asyncio
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from tests.support.fake_vllm import VLLM_VERSION, FakeVLLM
from tests.support.models import make_tokenizer
from treepo_trl.engines import SegmentRequest
from treepo_trl.servers.checks import ServerNeeds
from treepo_trl.servers.connection import ServerLostError, run_in_loop
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.servers.fleet import Fleet
from treepo_trl.servers.reference import Reference
from treepo_trl.servers.versions import AdapterVersions, PolicyVersions


LORA: dict[str, dict[str, Any]] = {"lora_config": {"max_loras": 2, "max_lora_rank": 8}}
MODEL = "/models/base"
NEEDS = ServerNeeds(MODEL, make_tokenizer(), 64, with_entropies=True, num_adapters=2, adapter_rank=8)


_ANSWERED = {"/pause", "/update_weight_version", "/resume", "/collective_rpc"}


class PolicyFake(FakeVLLM):
    """
    A fake server that loads adapters and weights, and computes log-probabilities that depend on them.

    Attributes:
        adapters: name and folder of what is loaded, in order.
        offset: nats by which this server is wrong.
        served: versions from which it has sampled.
        calls: what was asked of it around its weights, in order.
        fails: paths that get status 500.
        hangs, hanging: paths that get no answer, and those that somebody waits for.
    """

    def __init__(self, changes: Any = LORA) -> None:
        self.adapters: dict[str, str] = {}
        self.offset = 0.0
        self.version = VLLM_VERSION
        self.loads_adapters = True
        self.can_load = True
        self.tokenizer = make_tokenizer()
        self.weights = "default"
        self.unloaded: list[str] = []
        self.calls: list[str] = []
        self.fails: set[str] = set()
        self.served: set[str] = set()
        self.hangs: set[str] = set()
        self.hanging: list[str] = []
        self.reloads = True
        self.while_reloading: Callable[[], None] = lambda: None
        super().__init__(changes=changes)

    def __enter__(self) -> "PolicyFake":
        return self

    def restart(self) -> None:
        self.forget()
        self.start()

    def forget(self) -> None:
        """All that a restart costs, of a server that nobody was connected to."""
        self.adapters.clear()
        self.weights = "default"

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        model = json.loads(await request.read())["model"]
        if model not in ("base", *self.adapters):
            message = f"The model `{model}` does not exist."
            return web.json_response({"error": {"message": message}}, status=404)
        return await super()._generate(request)

    def _proper(self, body: dict[str, Any]) -> dict[str, Any]:
        version = os.path.basename({**self.adapters, "base": self.weights}[body["model"]])
        if body["sampling_params"].get("prompt_logprobs") is None:
            self.served.add(version)
            return super()._proper(body)
        value = computed(version) + self.offset
        ids = body["token_ids"]
        return {"prompt_logprobs": [None, *({str(token): {"logprob": value}} for token in ids[1:])]}

    async def _other(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read() or "{}") if request.method == "POST" else {}
        path = request.path
        await self._hang(path)
        if path == "/version":
            return web.json_response({"version": self.version})
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return web.json_response({"tokens": ids})
        if path == "/v1/models":
            lines = [{"id": name, "root": root, "parent": "base"} for name, root in self.adapters.items()]
            base = {"id": "base", "root": MODEL, "parent": None, "max_model_len": 64}
            return web.json_response({"data": [base, *({**line, "max_model_len": None} for line in lines)]})
        if path == "/v1/load_lora_adapter" and self.loads_adapters:
            return self._load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            self.unloaded.append(body["lora_name"])
            del self.adapters[body["lora_name"]]
            return web.Response(text="")
        if path == "/weight_info":
            return web.json_response({"weight_version": self.weights})
        if path == "/update_weight_version" and path not in self.fails:
            self.weights = body["new_version"]
        if path == "/collective_rpc":
            self.while_reloading()
        if path == "/collective_rpc" and not self.reloads:
            return web.json_response({"error": {"message": "no such folder"}}, status=500)
        if path in _ANSWERED:
            self.calls.append(path)
            is_right = path not in self.fails
            answer = {} if is_right else {"error": {"message": f"{path} has failed"}}
            return web.json_response(answer, status=200 if is_right else 500)
        return await super()._other(request)

    async def _hang(self, path: str) -> None:
        if path not in self.hangs:
            return
        self.hanging.append(path)
        try:
            while path in self.hangs:
                await asyncio.sleep(0.01)
        finally:  # also where nobody waits for an answer any more
            self.hanging.remove(path)

    def _load(self, name: str, folder: str) -> web.Response:
        if name in self.adapters:
            return web.json_response({"error": {"message": f"'{name}' has already been loaded"}}, status=400)
        if not self.can_load:
            return web.json_response({"error": {"message": "rank 64 is too large"}}, status=500)
        if not os.path.isfile(f"{folder}/weights"):
            return web.json_response({"error": {"message": f"No adapter found for {folder}"}}, status=404)
        self.adapters[name] = folder
        return web.Response(text="")


def write_version(folder: str) -> str:
    Path(folder, "weights").write_text("1")
    return folder


def opened(stack: ExitStack, folder: Path, count: int = 1, **options: Any) -> tuple[Fleet, list[PolicyFake]]:
    """Fakes that end with the stack, and the fleet of a training over them."""
    changes = options.pop("changes", LORA)
    fakes = [stack.enter_context(PolicyFake(changes)) for _ in range(count)]
    versions = options.pop("versions", AdapterVersions)(str(folder), "run")
    fleet = fleet_of([fake.url for fake in fakes], versions, **options)
    stack.callback(fleet.close)
    return fleet, fakes


def fleet_of(urls: list[str], versions: PolicyVersions, timeout: float = 60.0, is_probed: bool = True) -> Fleet:
    return Fleet(urls, NEEDS, versions, timeout, model="base", reference=Reference(NEEDS, is_probed))


def versions_of(fleet: Fleet) -> PolicyVersions:
    assert isinstance(fleet.policy, PolicyVersions)
    return fleet.policy


def computed(version: str) -> float:
    """What a right server, and the policy, compute for each token of the probe: another number for each version."""
    return sum(map(ord, version)) / 100


def give(fleet: Fleet, step: int) -> None:
    """As a synchronization does."""
    versions = versions_of(fleet)
    versions.write(step, write_version)
    probe = fleet.distribute()
    if probe is not None:
        fleet.take_reference(torch.full((len(probe) - 1,), computed(str(versions.name)), dtype=torch.float64))


def admit(fleet: Fleet, position: int) -> None:
    run_in_loop(fleet.admit(fleet.servers[position]))


def lose(fleet: Fleet, position: int) -> None:
    async def lose() -> None:
        fleet.lose(fleet.servers[position].places[0], ServerLostError("gone"))

    run_in_loop(lose())


def engine_over(stack: ExitStack, fleet: Fleet) -> VLLMServerEngine:
    engine = VLLMServerEngine(fleet, [0])
    stack.callback(engine.close)
    return engine


def sample(engine: VLLMServerEngine) -> None:
    """A batch of the current version, on all servers that are there."""
    assert len(list(engine.complete([SegmentRequest(i, [5, 6], 3, tree=i) for i in range(6)]))) == 6
    engine.abort()
