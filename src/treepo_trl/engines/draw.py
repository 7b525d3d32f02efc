"""How the transformers engine draws tokens: the processors of `generate`, one draw per row, and what is reported."""

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .base import SamplingOptions


class TokenDraw:
    """
    Draws a token for each row of logits.

    Args:
        options ([`SamplingOptions`]):
            How tokens are drawn. They come from torch's global generator of the logits' device.
        with_entropies (`bool`):
            Whether the entropy of each distribution is reported.

    Attributes:
        reads_history (`bool`):
            Whether a draw depends on the tokens before it.
    """

    def __init__(self, options: SamplingOptions, with_entropies: bool) -> None:
        self.is_greedy = options.temperature == 0.0
        self.with_entropies = with_entropies
        self.reads_history = options.repetition_penalty != 1.0
        self._processors = logits_processors(options)

    def __call__(
        self, logits: torch.Tensor, histories: list[list[int]]
    ) -> tuple[list[int], list[float], list[float] | None]:
        """
        A token for each row of logits (rows, vocab), its log-probability, and its distribution's entropy in nats.

        `histories` are prompt and path of each row where `reads_history`, else they are not looked at.

        Raises:
            RuntimeError: if a row has no finite log-probability.
        """
        if self._processors:
            token_ids = _padded(histories if self.reads_history else [[]] * len(logits), logits.device)
            logits = self._processors(token_ids, logits)  # pyright: ignore[reportArgumentType]
        logprobs = logits.log_softmax(-1)
        if not torch.isfinite(logprobs.amax(-1)).all():
            raise RuntimeError(
                "The model's logits are not finite: its weights or a sampling option are broken. Look for a reward or "
                "a learning rate that made the loss infinite."
            )
        tokens = logprobs.argmax(-1, keepdim=True) if self.is_greedy else _sample(logprobs.exp())
        entropies = torch.special.entr(logprobs.exp()).sum(-1).tolist() if self.with_entropies else None
        return tokens[:, 0].tolist(), logprobs.gather(1, tokens)[:, 0].tolist(), entropies


def logits_processors(options: SamplingOptions) -> LogitsProcessorList:
    """The transformers processors for sampling options, in the order of `generate`."""
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature not in (0.0, 1.0):
        processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k > 0:  # vLLM writes -1 for all
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    return processors


def _padded(histories: list[list[int]], device: torch.device) -> torch.Tensor:
    """Token ids (rows, longest). A row is filled up with its last token: it is penalized already."""
    longest = max(map(len, histories))
    rows = [ids + ids[-1:] * (longest - len(ids)) for ids in histories]
    return torch.tensor(rows, dtype=torch.long, device=device)


def _sample(probabilities: torch.Tensor) -> torch.Tensor:
    """One index per row (rows, 1), drawn in proportion to (rows, vocab)."""
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1)
    # On CPU `multinomial` draws one exponential per entry; inverting the distribution function is 10 times faster.
    cumulative = probabilities.cumsum(-1)
    threshold = torch.rand(len(cumulative), 1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)  # never an entry of probability 0
    last_possible = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())  # where rounding overshoots
    return drawn.minimum(last_possible)
