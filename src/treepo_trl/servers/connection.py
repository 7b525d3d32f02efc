"""One vLLM server over HTTP: requests, their errors, and what the server says about itself."""

import asyncio
import atexit
import functools
import json as json_module
import threading
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import aiohttp

from treepo_trl.settings import place_and_headers

from .facts import ServerFacts, facts_from


Result = TypeVar("Result")

GENERATE = "/inference/v1/generate"
QUESTION_SECONDS = 30.0  # for what a server answers without its engine
_INFO = "/server_info?config_format=json"
# A server closes a connection that is idle for 5 seconds; one that is reused at that moment would look like a loss.
_IDLE_SECONDS = 2.0
_EXIT_SECONDS = 5.0  # that the end of a process waits for its connections


class ServerLostError(RuntimeError):
    """
    A server that cannot be reached, closes the connection, is silent past the deadline, or answers with 5xx.

    Attributes:
        status (`int`, *optional*):
            What it answered; `None` for no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerRefusedError(RuntimeError):
    """
    A request that a server has refused, or answered with something that is no JSON.

    Attributes:
        status (`int`), body (`str`):
            What it answered; the body is shortened.
    """

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


@functools.cache
def http_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests of this process to servers; it runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="treepo-trl-http", daemon=True).start()
    return loop


def run_in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine returns that runs in `http_loop`. Blocks, so it is not for that loop's own thread."""
    return asyncio.run_coroutine_threadsafe(work, http_loop()).result()


@functools.cache
def _session() -> aiohttp.ClientSession:
    """The connections of this process, made in the loop; proxies of the environment are ignored."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS)
    session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
    atexit.register(_close, session)
    return session


def _close(session: aiohttp.ClientSession) -> None:
    with suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(session.close(), http_loop()).result(_EXIT_SECONDS)


class ServerConnection:
    """
    A vLLM server at an address. Its coroutines run in `http_loop`.

    A user and a password in the address are sent, and never shown.

    Args:
        url (`str`):
            Such as `"http://localhost:8000"` or `"https://user:password@host/prefix"`.
        timeout (`float`, *optional*, defaults to 240):
            Seconds after which a request that has no answer counts as lost.

    Attributes:
        url (`str`):
            The address without user and password.

    Raises:
        ValueError: for an address that is none.
    """

    def __init__(self, url: str, timeout: float = 240.0) -> None:
        self.url, self._headers = place_and_headers(url)
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"ServerConnection({self.url!r})"

    # Requests

    async def get(self, path: str, timeout: float | None = None) -> Any:
        """What the server answers to `GET`; as `ask`."""
        return await self.ask("GET", path, timeout=timeout)

    async def post(self, path: str, json: Mapping[str, object] | None = None, timeout: float | None = None) -> Any:
        """What the server answers to `POST`; as `ask`."""
        return await self.ask("POST", path, json, timeout=timeout)

    async def ask(
        self,
        method: str,
        path: str,
        json: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """
        What the server answers: parsed JSON, or `None` for an empty body.

        Raises:
            ServerLostError: without an answer, or for 5xx.
            ServerRefusedError: for any other status than 200, or for what is no JSON.
        """
        seconds = self.timeout if timeout is None else timeout
        try:
            async with _session().request(
                method,
                self.url + path,
                json=json,
                headers={**self._headers, **(headers or {})},
                timeout=aiohttp.ClientTimeout(total=seconds),
                allow_redirects=False,  # the password stays here
            ) as answer:
                status, body = answer.status, await answer.read()
        except TimeoutError:
            raise ServerLostError(f"{self.url} has not answered {method} {path} for {seconds:g} s.") from None
        except (aiohttp.ClientError, OSError) as error:
            # Not chained: some of these show the headers.
            reason = f"{type(error).__name__}: {error}"
            raise ServerLostError(f"{self.url} gives no answer to {method} {path} ({reason}).") from None
        return self._read(method, path, status, body)

    def _read(self, method: str, path: str, status: int, body: bytes) -> Any:
        """The JSON of an answer, or the error that its status stands for."""
        try:
            parsed = json_module.loads(body) if body else None
        except ValueError:
            parsed = body
        if status == 200 and parsed is not body:
            return parsed
        text = _error_text(parsed, body)
        if status >= 500:
            raise ServerLostError(f"{self.url} answers {method} {path} with status {status}: {text}", status)
        what = "is no JSON" if status == 200 else f"has status {status}"
        raise ServerRefusedError(f"The answer of {self.url} to {method} {path} {what}: {text}", status, text)

    # What the server says about itself

    async def has_answered(self, error: ServerLostError) -> bool:
        """Whether the server is there after this error: vLLM answers 500 for what it cannot load."""
        return error.status is not None and await self.is_healthy()

    async def is_healthy(self) -> bool:
        """Whether `/health` answers."""
        try:
            await self.get("/health", QUESTION_SECONDS)
        except (ServerLostError, ServerRefusedError):
            return False
        return True

    async def models(self) -> dict[str, str]:
        """
        The base and the adapters that are loaded: the name of each, and the folder or hub id of its weights.

        Raises:
            ValueError: if what answers is no vLLM server.
        """
        try:
            return {line["id"]: line["root"] for line in (await self.get("/v1/models", QUESTION_SECONDS))["data"]}
        except (ServerRefusedError, KeyError, TypeError) as error:
            raise ValueError(self._no_vllm("/v1/models", error)) from None

    async def facts(self) -> ServerFacts:
        """
        How the server was started, from `/version` and `/server_info`.

        Raises:
            ServerLostError: if it cannot be reached.
            ValueError: if it is no vLLM server, or does not tell; the error names what it was started without.
        """
        try:
            version = (await self.get("/version", QUESTION_SECONDS))["version"]
        except (ServerRefusedError, KeyError, TypeError) as error:
            raise ValueError(self._no_vllm("/version", error)) from None
        try:
            return facts_from(version, (await self.get(_INFO, QUESTION_SECONDS))["vllm_config"])
        except ServerRefusedError as error:
            if error.status != 404:
                raise
            raise ValueError(
                f"The server {self.url} does not tell its limits: it was started without the developer endpoints. "
                "Start it again with `VLLM_SERVER_DEV_MODE=1` in its environment."
            ) from None
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The server {self.url}, vLLM {version}, describes itself in another form: {error!r} is missing in "
                "`/server_info`. Start a server of the vLLM version that is installed here."
            ) from None

    async def can_generate(self) -> bool:
        """Whether the server takes token ids at `/inference/v1/generate`, that is, runs with `--enable-scale-out`."""
        try:
            await self.get(GENERATE, QUESTION_SECONDS)
        except ServerRefusedError as error:
            return error.status == 405  # there, but not for GET
        return True

    async def tokenize(self, text: str) -> list[int]:
        """Tokens of a text by the server's tokenizer, without special tokens."""
        question = {"prompt": text, "add_special_tokens": False}
        return (await self.post("/tokenize", question, QUESTION_SECONDS))["tokens"]

    async def reset_prefix_cache(self) -> None:
        """
        Forget all keys and values.

        Raises:
            RuntimeError: if the server answers that it did not.
        """
        answer = await self.post("/reset_prefix_cache")
        if answer is not None and not answer.get("success", True):
            raise RuntimeError(
                f"The server {self.url} has not emptied its prefix cache: requests of somebody else are running. "
                "A server serves one training."
            )

    def _no_vllm(self, path: str, error: Exception) -> str:
        reason = str(error) if isinstance(error, ServerRefusedError) else f"{path} has no {error}."
        return f"What answers at {self.url} is no vLLM server. {reason} Start one there, or correct the address."


def _error_text(parsed: object, body: bytes) -> str:
    """What an answer says, in at most 500 characters: vLLM's message if it is one."""
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error["message"][:500]
    return body[:500].decode(errors="replace").strip()
