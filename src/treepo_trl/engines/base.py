"""What the sampler asks of an engine: continue token sequences by at most one segment."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal

from treepo_trl.settings import Ranges, check_fields


_RANGES: Ranges = {
    "temperature": (lambda value: value >= 0, "0 (greedy) or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1 (all tokens)"),
    "top_k": (lambda value: value >= -1, "0 or -1 (all tokens) or more"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 (all tokens) and 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0 (1 is none)"),
}


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """
    How a next token is drawn, in TRL's names and meanings.

    Raises:
        ValueError: for a value outside of its range. `TypeError` for one that is no number.
    """

    temperature: float = field(default=1.0, metadata={"help": "Divides the logits; 0 takes the most likely token."})
    top_p: float = field(
        default=1.0, metadata={"help": "Smallest total probability of the tokens considered; 1 considers all."}
    )
    top_k: int = field(default=0, metadata={"help": "Number of tokens considered; 0 or -1 considers all."})
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Smallest probability of a token considered, as a fraction of the largest. Default: all tokens "
            "are considered."
        },
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty on tokens that occur in the prompt or the path; 1 is none."}
    )

    def __post_init__(self) -> None:
        check_fields(self, SamplingOptions, _RANGES)


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """One segment to sample."""

    request_id: int
    """Chosen by the caller, unique among the requests in flight."""
    token_ids: list[int]
    """Prompt and path so far: everything that the segment continues."""
    max_tokens: int
    """Longest segment to return, at least 1."""
    tree: int = 0
    """Requests of one tree share prefixes; an engine of several servers keeps them together. Unique in flight."""


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """One sampled segment."""

    request_id: int
    """Id of the request that it answers."""
    token_ids: list[int]
    """Sampled tokens, the EOS token included if one was sampled; at least one."""
    logprobs: list[float]
    """Log-probability of each token under the distribution that it was sampled from."""
    finish_reason: Literal["stop", "length"]
    """`stop` if the last token is an EOS token, `length` if `max_tokens` was reached."""
    entropies: list[float] | None = None
    """Entropy in nats of each token's distribution, if the engine was asked for it."""


class SegmentEngineError(RuntimeError):
    """
    A request that an engine could not serve.

    Args:
        request_id (`int`):
            Id of the request.
        message (`str`):
            What is wrong with it.
    """

    def __init__(self, request_id: int, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class SegmentEngine(ABC):
    """
    Samples segments. A new engine defines `submit`, `collect` and `abort`; the rest has defaults.

    Requests may finish in any order. A prefix that requests share should be computed once.

    Attributes:
        context_length (`int`, *optional*):
            Longest sequence (prompt and completion tokens) that the engine can hold; `None` without a limit.
        num_cache_tokens (`int`, *optional*):
            Tokens whose keys and values the engine can keep, running requests included; `None` if unknown.
        block_size (`int`, *optional*):
            Tokens per block of the prefix cache, of which only full blocks are found again; `None` if every prefix is.
        reports_entropies (`bool`, defaults to `False`):
            Whether results carry entropies.
        num_prompt_tokens (`int`), num_cached_tokens (`int`):
            Tokens of the requests served so far, and how many of them did not have to be computed again. 0 for an
            engine that does not count.
    """

    context_length: int | None = None
    num_cache_tokens: int | None = None
    block_size: int | None = None
    reports_entropies: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    @abstractmethod
    def submit(self, requests: list[SegmentRequest]) -> None:
        """Queue requests. Returns at once."""

    @abstractmethod
    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        """
        Block until at least one queued request is done; return what is done, each result once.

        Args:
            wake (`Callable[[], bool]`, *optional*):
                Something else has happened once it returns `True`: an engine that asks now and then may return early,
                with nothing. Given only where turns are answered.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop everything that is queued or running, so that the engine can be used again after an error."""

    def num_slots(self, length: int) -> int | None:
        """Requests that run at once when the longest of them has `length` tokens; `None` without a limit."""
        return None

    def end_tree(self, tree: int) -> None:
        """No further request of this tree comes. An engine of several servers counts; does nothing by default."""
        return

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values. Needed after a change of the weights; does nothing by default."""
        return

    def complete(self, requests: list[SegmentRequest]) -> Generator[SegmentResult, None, None]:
        """
        Serve requests to the end: submit them all, and yield each result as soon as it is there.

        Nothing else may be in flight. An error, or a caller that stops early, aborts what is still running.
        """
        try:
            self.submit(requests)
            num_missing = len(requests)
            while num_missing:
                results = self.collect()
                num_missing -= len(results)
                yield from results
            for tree in {request.tree for request in requests}:
                self.end_tree(tree)
        except BaseException:
            self.abort()
            raise
