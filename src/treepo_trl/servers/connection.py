"""One vLLM server over HTTP: requests, their errors, and what the server says about itself."""

import asyncio
import functools
import json as json_module
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import aiohttp

from treepo_trl.settings import place_and_headers

from .facts import ServedModel, ServerFacts, facts_from


logger = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
MOST_DEADLINES = 4  # that a request waits for a server that is healthy: one that hangs may answer `/health` too

_QUESTION_SECONDS = 30.0  # for what a server answers without its engine
_INFO = "/server_info?config_format=json"
# A server closes a connection that is idle for 5 seconds; one that is reused at that moment would look like a loss.
_IDLE_SECONDS = 2.0


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


class ServerConnection:
    """
    A vLLM server at an address.

    Proxies of the environment are ignored. A user and a password in the address are sent, and never shown.

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
        self._loop = http_loop()
        self._session: aiohttp.ClientSession | None = None
        self._is_told_slow = False
        self._question: asyncio.Future[Any] | None = None

    def __repr__(self) -> str:
        return f"ServerConnection({self.url!r})"

    # Requests

    def get(self, path: str, timeout: float | None = None) -> Any:
        """
        What the server answers to `GET`: parsed JSON, or `None` for an empty body. Blocks.

        Raises:
            ServerLostError: without an answer, or for 5xx.
            ServerRefusedError: for any other status than 200, or for what is no JSON.
        """
        return self._wait(self.ask("GET", path, timeout=timeout))

    def post(self, path: str, json: Mapping[str, object] | None = None, timeout: float | None = None) -> Any:
        """What the server answers to `POST`; as `get`."""
        return self._wait(self.ask("POST", path, json, timeout=timeout))

    async def ask(
        self,
        method: str,
        path: str,
        json: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """What the server answers, for coroutines in `http_loop`; as `get`."""
        if self._session is None:
            self._session = self._open()
        seconds = self.timeout if timeout is None else timeout
        try:
            async with self._session.request(
                method,
                self.url + path,
                json=json,
                headers=headers,
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

    async def ask_patiently(
        self,
        method: str,
        path: str,
        json: Mapping[str, object],
        headers: Mapping[str, str],
        seconds: float,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> Any:
        """
        As `ask`, but a server that is healthy after `seconds` is waited for, `MOST_DEADLINES` times as long.

        All requests whose deadlines come together ask for its health once: each connection is an open file. `check`
        is called then too, which may cancel this: a connection stays open when a machine loses its power.
        """
        asking = asyncio.ensure_future(self.ask(method, path, json, headers, MOST_DEADLINES * seconds))
        try:
            for _ in range(MOST_DEADLINES - 1):
                if (await asyncio.wait({asking}, timeout=seconds))[0]:
                    break
                try:
                    await self._ask_health()
                except (ServerLostError, ServerRefusedError) as error:
                    if asking.done():  # meanwhile
                        break
                    raise ServerLostError(
                        f"{self.url} has not answered {method} {path} for {seconds:g} s. Nor is it healthy: {error}"
                    ) from None
                if check is not None:
                    await check()
                self._tell_slow(seconds)
            return await asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_health(self) -> None:
        if self._question is None or self._question.done():
            self._question = asyncio.ensure_future(self.ask("GET", "/health", timeout=_QUESTION_SECONDS))
        await asyncio.shield(self._question)  # a request that is cancelled leaves it to the others

    def _tell_slow(self, seconds: float) -> None:
        if not self._is_told_slow:
            logger.warning(
                f"The vLLM server at {self.url} has not answered a request for {seconds:g} s (`vllm_server_timeout`). "
                f"It is healthy, so it is waited for, {MOST_DEADLINES} times as long in all. Raise the setting if "
                "requests take that long; if not, look at the server's log. This is said once."
            )
            self._is_told_slow = True

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

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS)
        session = aiohttp.ClientSession(connector=connector, headers=self._headers, trust_env=False)
        weakref.finalize(self, _close, session, self._loop)
        return session

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Close all connections; a later request opens new ones. Not needed at the end of the process."""
        session, self._session = self._session, None
        if session is not None:
            self._wait(session.close())

    # What the server says about itself

    def has_answered(self, error: ServerLostError) -> bool:
        """Whether the server is there after this error: vLLM answers 500 for what it cannot load."""
        return error.status is not None and self.is_healthy()

    def is_healthy(self) -> bool:
        """Whether `/health` answers."""
        try:
            self.get("/health", _QUESTION_SECONDS)
        except (ServerLostError, ServerRefusedError):
            return False
        return True

    def models(self) -> list[ServedModel]:
        """
        The base and the adapters that are loaded.

        Raises:
            ValueError: if what answers is no vLLM server.
        """
        try:
            lines = self.get("/v1/models", _QUESTION_SECONDS)["data"]
            return [ServedModel(line["id"], line["root"], line["parent"], line["max_model_len"]) for line in lines]
        except (ServerRefusedError, KeyError, TypeError) as error:
            raise ValueError(self._no_vllm("/v1/models", error)) from None

    def facts(self) -> ServerFacts:
        """
        How the server was started, from `/version` and `/server_info`.

        Raises:
            ServerLostError: if it cannot be reached.
            ValueError: if it is no vLLM server, or does not tell; the error names what it was started without.
        """
        try:
            version = self.get("/version", _QUESTION_SECONDS)["version"]
        except (ServerRefusedError, KeyError, TypeError) as error:
            raise ValueError(self._no_vllm("/version", error)) from None
        try:
            return facts_from(version, self.get(_INFO, _QUESTION_SECONDS)["vllm_config"])
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

    def can_generate(self) -> bool:
        """Whether the server takes token ids at `/inference/v1/generate`, that is, runs with `--enable-scale-out`."""
        try:
            self.get(GENERATE, _QUESTION_SECONDS)
        except ServerRefusedError as error:
            return error.status == 405  # there, but not for GET
        return True

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text by the server's tokenizer, without special tokens."""
        return self.post("/tokenize", {"prompt": text, "add_special_tokens": False}, _QUESTION_SECONDS)["tokens"]

    def reset_prefix_cache(self) -> None:
        """
        Forget all keys and values.

        Raises:
            RuntimeError: if the server answers that it did not.
        """
        answer = self.post("/reset_prefix_cache")
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


def _close(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop) -> None:
    """Close a session whose connection is gone, or whose process ends."""
    if not session.closed:
        closing = asyncio.run_coroutine_threadsafe(session.close(), loop)
        if threading.current_thread() is threading.main_thread():  # else the loop's own thread might wait for itself
            with suppress(TimeoutError):  # a process that ends does not wait for long
                closing.result(timeout=5)
