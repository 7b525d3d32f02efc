"""What the engines over a model of this process share: its rows, the age of its weights, one comparison."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .base import SegmentRequest, SegmentResult


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
    outputs = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)
    expected = outputs.logits[0, -1].float().log_softmax(-1)
    difference = (expected.exp() * (expected - logits.float().log_softmax(-1)).abs()).sum().item()
    is_exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    tolerance = _TOLERANCE if is_exact and model.device.type == "cpu" else _HALF_PRECISION_TOLERANCE
    if not difference <= tolerance:  # so that a difference that is no number stops the run too
        raise RuntimeError(
            f"The transformers engine does not compute what {type(model).__name__} computes: after {len(token_ids)} "
            f"tokens, log-probabilities differ by {difference:.2g} nats on average, where rounding explains "
            f"{tolerance:.2g}. Put the model into evaluation mode, or set `use_vllm=True`."
        )
