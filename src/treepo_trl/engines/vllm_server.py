"""Segments from one or several vLLM servers: whole trees are placed, lost servers are replaced, token ids travel."""

from collections.abc import Callable, Mapping

from .base import SamplingOptions, SegmentEngine, SegmentRequest, SegmentResult
from .server_connection import ServerConnection


class VLLMServerEngine(SegmentEngine):
    """
    [`SegmentEngine`] over vLLM servers with `--enable-scale-out`.

    A tree lives on the server with the fewest unfinished trees until it is done. A server that is lost gives its
    trees and open requests to the others, and is asked again until it is back.

    Args:
        servers (`list[ServerConnection]`):
            Servers that answer now; the engine reads their limits.
        eos_token_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`], *optional*):
            How tokens are drawn.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`vllm.SamplingParams`]; they win over `options`.
        with_entropies (`bool`, *optional*, defaults to `False`):
            Whether results carry the entropy of each token's distribution, from vLLM's 20 largest log-probabilities.
        model (`str`, *optional*):
            Name that requests ask for, of the base or an adapter. Default: the base of the first server.
        timeout (`float`, *optional*, defaults to 240):
            Seconds without any server after which `collect` fails, and deadline of a request.
        on_connect (`Callable[[ServerConnection], None]`, *optional*):
            Called, in a thread, with a server that was lost and answers again, before it gets a request. What it
            raises keeps the server out; it is called again later.

    Attributes:
        model (`str`):
            May be set between batches. A request keeps the name that was set when it was submitted.
        num_resent (`int`):
            Requests that were sent again, because their server was lost.
        num_lost (`int`):
            How often a server was lost.

    Raises:
        ServerLostError, ValueError: for servers that do not answer, or do not fit together.
    """

    def __init__(
        self,
        servers: list[ServerConnection],
        eos_token_ids: list[int],
        options: SamplingOptions | None = None,
        generation_kwargs: Mapping[str, object] | None = None,
        with_entropies: bool = False,
        *,
        model: str | None = None,
        timeout: float = 240.0,
        on_connect: Callable[[ServerConnection], None] | None = None,
    ) -> None:
        raise NotImplementedError

    def living_servers(self) -> list[ServerConnection]:
        """Servers that get requests now."""
        raise NotImplementedError

    def num_slots(self, length: int) -> int | None:
        """Requests that the living servers run at once, whatever their length."""
        raise NotImplementedError

    def submit(self, requests: list[SegmentRequest]) -> None:
        """Queue requests. Returns at once."""
        raise NotImplementedError

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        """
        Block until at least one queued request is done; return what is done.

        Raises:
            SegmentEngineError: for a request that a server refuses.
            RuntimeError: if no server was there for `timeout` seconds.
        """
        raise NotImplementedError

    def abort(self) -> None:
        """Drop everything that is queued or running: a server drops a request whose connection is closed."""
        raise NotImplementedError

    def end_tree(self, tree: int) -> None:
        """The tree no longer counts where it lived."""
        raise NotImplementedError

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values, on every living server."""
        raise NotImplementedError
