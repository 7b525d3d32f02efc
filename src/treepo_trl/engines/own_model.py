"""What the engines over a model of this process share: what waits, its rows, the age of its weights, a comparison."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from treepo_trl.model_support import without_adapter

from .base import SamplingOptions, SegmentEngine, SegmentEngineError, SegmentRequest, SegmentResult
from .draw import TokenDraw


_TOLERANCE = 1e-3  # nats, mean under the model's own distribution, in float32
_HALF_PRECISION_TOLERANCE = 0.3  # rounding of bfloat16 alone gives a tenth of it


@dataclass(eq=False)
class Row:
    """A segment that is being sampled."""

    request: SegmentRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def path(self) -> list[int]:
        """Tokens of the request and those sampled so far."""
        return self.request.token_ids + self.token_ids

    @property
    def position(self) -> int:
        """Position of the token that is fed next."""
        return len(self.request.token_ids) + len(self.token_ids) - 1

    @property
    def next_input(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.request.token_ids[-1]

    def add(
        self, token: int, logprob: float, entropy: float | None, eos_token_ids: frozenset[int]
    ) -> SegmentResult | None:
        """Take a sampled token; the segment, if it is done with it."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if entropy is not None:
            self.entropies.append(entropy)
        is_eos = token in eos_token_ids
        if not is_eos and len(self.token_ids) < self.request.max_tokens:
            return None
        reason = "stop" if is_eos else "length"
        return SegmentResult(self.request.request_id, self.token_ids, self.logprobs, reason, self.entropies or None)


class OwnModelEngine(SegmentEngine):
    """
    [`SegmentEngine`] over a model in this process: what waits, and what was counted.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        eos_token_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`], *optional*):
            How tokens are drawn. They come from torch's global generator of the model's device.
        with_entropies (`bool`):
            Whether results carry the entropy of each token's distribution.

    Attributes:
        num_prefilled_tokens (`int`):
            Prompt and path tokens computed so far; requests with the same prefix count once.
    """

    def __init__(
        self, model: PreTrainedModel, eos_token_ids: list[int], options: SamplingOptions | None, with_entropies: bool
    ) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.options = options or SamplingOptions()
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.reports_entropies = with_entropies
        self.num_prompt_tokens = 0
        self.num_prefilled_tokens = 0
        self._vocab_size: int = config.vocab_size
        self._draw = TokenDraw(self.options, with_entropies)
        self._pending: list[SegmentRequest] = []
        self._weights_version = weights_version(model)
        self._has_compared = False
        self._cache_argument = _cache_argument(model)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of requests that were not computed again."""
        return self.num_prompt_tokens - self.num_prefilled_tokens

    def submit(self, requests: list[SegmentRequest]) -> None:
        """
        Queue requests. Returns at once.

        Raises:
            SegmentEngineError: for a request with a token that the model does not have.
        """
        for request in requests:
            if not 0 <= min(request.token_ids) <= max(request.token_ids) < self._vocab_size:
                raise SegmentEngineError(
                    request.request_id,
                    f"A request holds token ids outside of the model's vocabulary of {self._vocab_size}: the "
                    "tokenizer does not belong to the model.",
                )
        self._pending.extend(requests)

    def _draw_next(self, rows: Sequence[Row], logits: torch.Tensor) -> list[SegmentResult | None]:
        """Sample a token for each row from its logits; gives the segments of the rows that are done with it."""
        histories = [row.path for row in rows] if self._draw.reads_history else []
        token_ids, logprobs, entropies = self._draw(logits, histories)
        drawn = zip(rows, token_ids, logprobs, entropies or [None] * len(rows), strict=True)
        return [row.add(token, logprob, entropy, self.eos_token_ids) for row, token, logprob, entropy in drawn]

    def _drop_stale_states(self) -> None:
        """Forget states that were computed with other weights."""
        if self._weights_version != (version := weights_version(self.model)):
            self._weights_version = version
            self.reset_prefix_cache()


def affordable_bytes(device: torch.device) -> int:
    """Memory that a batch, or what is kept for later, may take by default."""
    return torch.cuda.get_device_properties(device).total_memory // 5 if device.type == "cuda" else 2**32


def no_cache_argument(model: PreTrainedModel) -> str:
    """What is said of a model whose forward does not have the arguments of those of transformers."""
    return (
        f"The transformers engine cannot sample from {type(model).__name__}: its forward takes no cache as those of "
        "transformers do. Set `use_vllm=True`."
    )


def _cache_argument(model: PreTrainedModel) -> str:
    """
    What the forward of a model calls its cache: `cache` since transformers 5.24.

    Before, and in code that comes with a checkpoint, it is `past_key_values`, and `cache_params` of recurrent models.

    Raises:
        ValueError: if there is none.
    """
    base = without_adapter(model)
    arguments = inspect.signature(base.forward).parameters
    found = next((name for name in ("cache", "past_key_values", "cache_params") if name in arguments), None)
    if found is None:
        raise ValueError(no_cache_argument(base))
    return found


def weights_version(model: torch.nn.Module) -> int:
    """
    A number that changes with the weights.

    In-place updates, such as an optimizer's, raise a parameter's version. So stale states are dropped even if nobody
    calls `reset_prefix_cache`.
    """
    return sum(parameter._version for parameter in model.parameters())


@torch.no_grad()
def compare_with_plain_forward(model: PreTrainedModel, token_ids: list[int], logits: torch.Tensor) -> None:
    """
    Raise if an engine's logits are not those of the model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, with the attention that it trains with.
        token_ids (`list[int]`):
            A path.
        logits (`torch.Tensor` of shape `(vocab,)`):
            What the engine has drawn the token after it from.

    Raises:
        RuntimeError: if they differ by more than rounding explains.
    """
    types = {parameter.dtype for parameter in model.parameters()}
    with _noted_type(model, types):
        outputs = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)
    expected = outputs.logits[0, -1].float().log_softmax(-1)
    difference = (expected.exp() * (expected - logits.float().log_softmax(-1)).abs()).sum().item()
    is_exact = _is_exact(types | {outputs.logits.dtype}, model.device.type)
    tolerance = _TOLERANCE if is_exact else _HALF_PRECISION_TOLERANCE
    if not difference <= tolerance:  # so that a difference that is no number stops the run too
        precision = " in float32" if is_exact else ""
        raise RuntimeError(
            f"The transformers engine does not compute what {type(model).__name__} computes: after {len(token_ids)} "
            f"tokens, log-probabilities differ by {difference:.2g} nats on average, where rounding{precision} "
            f"explains {tolerance:.2g}. Put the model into evaluation mode, or set `use_vllm=True`."
        )


@contextmanager
def _noted_type(model: PreTrainedModel, types: set[torch.dtype]) -> Iterator[None]:
    """
    Add what the head computes in to `types` during a block.

    Accelerate's mixed precision is inside the model's own `forward`, over weights and logits in float32.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_hook(lambda _head, _inputs, logits: types.add(logits.dtype))
    try:
        yield
    finally:
        handle.remove()


def _is_exact(types: set[torch.dtype], device_type: str) -> bool:
    """Whether all of a model computes in float32: no half precision, no quantised weights, no TF32."""
    if types != {torch.float32}:
        return False
    return device_type == "cpu" or (device_type == "cuda" and torch.get_float32_matmul_precision() == "highest")
