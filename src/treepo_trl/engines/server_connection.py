"""One vLLM server over HTTP: requests, their errors, and what the server says about itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ServerLostError(RuntimeError):
    """A server that cannot be reached, closes the connection, is silent past the deadline, or answers with 5xx."""


class ServerRefusedError(RuntimeError):
    """
    A request that a server has refused with a status of 4xx, or answered with something that is no JSON.

    Attributes:
        status (`int`), body (`str`):
            What it answered; the body is shortened.
    """

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A line of `GET /v1/models`: the base, or an adapter that is loaded."""

    id: str
    """Name to ask for."""
    root: str
    """Folder or hub id of its weights."""
    parent: str | None
    """Name of the base, for an adapter."""
    max_model_len: int | None
    """Longest sequence, for the base."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """How a server was started."""

    version: str
    """Of vLLM."""
    model: str
    """Folder or hub id of the base."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    vocab_size: int | None
    """Rows of the model's embedding, if the server tells."""
    context_length: int
    """`max_model_len`: longest sequence."""
    dtype: str
    """Such as `bfloat16`."""
    quantization: str | None
    """Such as `bitsandbytes`."""
    logprobs_mode: str
    """`processed_logprobs` are those of the sampling distribution."""
    max_logprobs: int
    """Most log-probabilities per token; -1 without a limit."""
    prefix_caching: bool
    """Whether the server finds prefixes again."""
    block_size: int | None
    """Tokens per block of the prefix cache."""
    num_cache_tokens: int | None
    """Tokens that all of its ranks can keep."""
    num_slots: int
    """Requests that all of its ranks run at once."""
    data_parallel_size: int
    """Ranks, each with a cache of its own."""
    max_loras: int
    """Adapters that it holds at once; 0 without LoRA."""
    max_lora_rank: int
    """Highest rank of an adapter; 0 without LoRA."""


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
        raise NotImplementedError

    def get(self, path: str, timeout: float | None = None) -> Any:
        """
        What the server answers to `GET`: parsed JSON, or `None` for an empty body. Blocks.

        Raises:
            ServerLostError: without an answer, or for 5xx.
            ServerRefusedError: for 4xx.
        """
        raise NotImplementedError

    def post(self, path: str, json: Mapping[str, object] | None = None, timeout: float | None = None) -> Any:
        """What the server answers to `POST`; as `get`."""
        raise NotImplementedError

    async def ask(
        self,
        method: str,
        path: str,
        json: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """What the server answers, for coroutines of the loop of `http_loop`; as `get`."""
        raise NotImplementedError

    def is_healthy(self) -> bool:
        """Whether `/health` answers."""
        raise NotImplementedError

    def models(self) -> list[ServedModel]:
        """The base and the adapters that are loaded."""
        raise NotImplementedError

    def facts(self) -> ServerFacts:
        """
        How the server was started, from `/version`, `/v1/models` and `/server_info`.

        Raises:
            ServerLostError: if it cannot be reached.
            ValueError: if it is no vLLM server, or lacks a flag without which it does not tell; the error names it.
        """
        raise NotImplementedError

    def can_generate(self) -> bool:
        """Whether the server has `/inference/v1/generate`, that is `--enable-scale-out`."""
        raise NotImplementedError

    def reset_prefix_cache(self) -> None:
        """
        Forget all keys and values.

        Raises:
            RuntimeError: if the server answers that it did not.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close all connections. Not needed at the end of the process."""
        raise NotImplementedError
