"""
A server without a model that speaks as vLLM does, and misbehaves on request.

    python -m tests.support.fake_vllm 2   # two of them, for a benchmark; prints their addresses, ends with its input
"""

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self

from aiohttp import web

from tests.support.fakes import EOS, FakeEngine, MarkovEngine, memoryless
from treepo_trl.engines import SegmentRequest, SegmentResult
from treepo_trl.servers.checks import installed_vllm
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.servers.fleet import Fleet
from treepo_trl.servers.versions import ServedPolicy


VLLM_VERSION = installed_vllm() or "0.31.0"
"""What a fake server says it is: servers must be of the version that is installed."""


# What happens to a request: a proper answer, one that comes late, a status, no answer, a closed connection, all
# connections closed and the port too, or one of several wrong answers.
Act = int | Literal["answer", "late", "silence", "close", "die", "no json", "other json", "abort"]
Script = Callable[[dict[str, Any]], Act]
Answerer = Callable[[SegmentRequest], SegmentResult]


def path_determined(stop_probability: float = 0.1, seed: int = 0) -> Answerer:
    """Tokens that follow from the path alone, whichever server is asked, and how often."""
    return lambda request: FakeEngine(memoryless(stop_probability), seed).answer(request)


def markov(prompt_length: int, seed: int = 0) -> Answerer:
    """Segments of the chain of `MarkovEngine`."""
    return MarkovEngine(prompt_length, seed).answer


def at_once(request: SegmentRequest) -> SegmentResult:
    """As little work as possible: the same token again and again."""
    return SegmentResult(request.request_id, [1] * request.max_tokens, [-1.0] * request.max_tokens, "length")


class FakeVLLM:
    """
    A fake server in a thread, on a port of its own that it keeps.

    Args:
        answer (`Answerer`):
            Tokens and log-probabilities of a proper answer.
        script (`Script`, *optional*):
            What happens to a request, by its body. Default: all are answered. May be set at any time.
        changes (`dict`, *optional*):
            What `/server_info` says in place of the defaults, such as `{"model_config": {"max_model_len": 64}}`.

    Attributes:
        bodies (`list[dict]`), headers (`list[dict]`):
            Of the requests for segments, in their order.
        num_answered (`int`):
            Proper answers.
        num_running (`int`):
            Requests whose connection is open and that have no answer.
        num_resets (`int`):
            How often the prefix cache was reset.
        num_health (`int`):
            How often `/health` was asked: a late answer comes after the next time.
        health (`int`):
            Status of `/health`.
    """

    def __init__(
        self,
        answer: Answerer = at_once,
        script: Script | None = None,
        changes: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        self.answer, self.script, self.changes = answer, script, changes or {}
        self.seconds = 0.0  # before an answer
        self.has_scale_out = self.has_dev_mode = self.resets = True
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.authorizations: set[str | None] = set()
        self.num_answered = self.num_running = self.num_resets = self.num_health = 0
        self.health = 200
        self.cached_tokens: int | None = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._runner: web.AppRunner | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def trees(self) -> list[int]:
        """First prompt token of each request, which names the tree in `sampling.prompts_of`."""
        return [body["token_ids"][0] for body in self.bodies]

    def start(self) -> None:
        """Listen, again on the same port."""
        self._wait(self._start())

    def die(self) -> None:
        """Close the port and all connections, as a killed process does."""
        self._wait(self._die())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=120)

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_route("*", "/{path:.*}", self._other)
        # A closed connection cancels its handler, as vLLM's does.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, backlog=4096)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # pyright: ignore[reportAttributeAccessIssue]

    async def _die(self) -> None:
        runner, self._runner = self._runner, None
        if runner is None:
            return
        assert runner.server is not None
        for connection in list(runner.server.connections):
            connection.force_close()
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    # Answers

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not self.has_scale_out:
            return web.json_response({"detail": "Not Found"}, status=404)
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.num_running += 1
        try:
            if self.seconds:
                await asyncio.sleep(self.seconds)
            return await self._act("answer" if self.script is None else self.script(body), request, body)
        finally:
            self.num_running -= 1

    async def _act(self, act: Act, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        if isinstance(act, int):
            error = {"error": {"message": f"scripted {act}", "code": act}}
            return web.json_response(error, status=act)
        if act in ("close", "die"):
            request.transport.abort()
        if act == "die":
            self._loop.create_task(self._die())
        if act in ("close", "die", "silence"):
            await asyncio.sleep(3600)
        asked_before = self.num_health
        while act == "late" and self.num_health == asked_before:
            await asyncio.sleep(0.01)
        if act == "no json":
            return web.Response(text="<html>a gateway of somebody's</html>")
        if act == "other json":
            return web.json_response({"choices": [{"text": "forty-two"}]})
        answer = self._proper(body)
        if act == "abort":
            answer["choices"][0] |= {"finish_reason": "abort", "token_ids": [], "logprobs": None}
        else:
            self.num_answered += 1
        return web.json_response(answer)

    def _proper(self, body: dict[str, Any]) -> dict[str, Any]:
        params, prompt = body["sampling_params"], body["token_ids"]
        result = self.answer(SegmentRequest(0, prompt, params["max_tokens"]))
        content = [
            {"token": f"token_id:{token}", "logprob": logprob, "top_logprobs": [{"logprob": logprob}]}
            for token, logprob in zip(result.token_ids, result.logprobs, strict=True)
        ]
        usage: dict[str, Any] = {"prompt_tokens": len(prompt)}
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        choice = {"token_ids": result.token_ids, "finish_reason": result.finish_reason}
        return {"choices": [choice | {"logprobs": {"content": content}}], "usage": usage}

    async def _other(self, request: web.Request) -> web.Response:
        self.authorizations.add(request.headers.get("Authorization"))
        path = request.path
        if path == "/inference/v1/generate" and self.has_scale_out:
            return web.json_response({"detail": "Method Not Allowed"}, status=405)
        if path == "/health":
            self.num_health += 1
            return web.Response(status=self.health)
        if path == "/version":
            return web.json_response({"version": VLLM_VERSION})
        if path == "/v1/models":
            length = self._config()["model_config"]["max_model_len"]
            base = {"id": "base", "root": "/models/base", "parent": None, "max_model_len": length}
            return web.json_response({"data": [base]})
        if path == "/server_info" and self.has_dev_mode:
            return web.json_response({"vllm_config": self._config()})
        if path == "/reset_prefix_cache":
            self.num_resets += 1
            return web.json_response({"success": self.resets})
        return web.json_response({"detail": "Not Found"}, status=404)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model_config": {
                "model": "/models/base",
                "served_model_name": "base",
                "max_model_len": 4096,
                "dtype": "torch.float32",
                "quantization": None,
                "logprobs_mode": "processed_logprobs",
                "max_logprobs": 20,
            },
            "cache_config": {"enable_prefix_caching": True, "block_size": 16, "num_gpu_blocks": 1000},
            "scheduler_config": {"max_num_seqs": 8},
            "parallel_config": {"data_parallel_size": 1},
            "lora_config": None,
            "weight_transfer_config": None,
        }
        for section, values in self.changes.items():
            config[section] = {**(config[section] or {}), **values}
        return config


@contextmanager
def fake_servers(count: int, answer: Answerer = at_once, **options: Any) -> Iterator[list[FakeVLLM]]:
    """Some of them, that end with the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(FakeVLLM(answer, **options)) for _ in range(count)]


def engine_of(
    servers: list[FakeVLLM],
    eos: int = EOS,
    policy: ServedPolicy | None = None,
    model: str | None = None,
    timeout: float = 240.0,
    **options: Any,
) -> VLLMServerEngine:
    """An engine over fake servers."""
    return VLLMServerEngine(Fleet([s.url for s in servers], None, policy, timeout, model=model), [eos], **options)


def set_deadline(engine: VLLMServerEngine, seconds: float) -> None:
    """Of requests that are sent from now on."""
    for server in engine.fleet.servers:
        server.connection.timeout = seconds


def scripted(*acts: Act, then: Act = "answer") -> Script:
    """These acts for the first requests, one after another, and then always the same."""
    left = list(acts)
    return lambda body: left.pop(0) if left else then


def at_random(rng: random.Random, *acts: Act) -> Script:
    """An act drawn for each request."""
    return lambda body: rng.choice(acts)


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for another thread, not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def main() -> None:
    """Serve until the input ends."""
    changes = {"scheduler_config": {"max_num_seqs": 64}}
    servers = [FakeVLLM(changes=changes) for _ in range(int(sys.argv[1]))]
    sys.stdout.write(" ".join(server.url for server in servers) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
