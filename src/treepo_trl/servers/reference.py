"""What all servers must compute alike: an old version or another model shows in the log-probabilities of a probe."""

from collections.abc import Sized
from typing import cast

import torch

from .checks import ServerNeeds
from .connection import GENERATE, ServerConnection, ServerLostError


_NUM_TOKENS = 64
# Nats per token between two models. In float32 another adapter of a tiny model is at 0.15, and rounding far below. The
# 14 nats of a random token are rounded by 0.06 to 0.09 in bfloat16 (SmolLM2-135M, vLLM against transformers).
_OTHER_MODEL, _OTHER_MODEL_IN_16_BITS = 0.1, 0.4


class Reference:
    """
    The log-probabilities that each server of a training must compute with the current version of the policy.

    Args:
        needs ([`ServerNeeds`]):
            Of the training.
        is_compared (`bool`):
            Whether servers are compared at all. Else a probe only shows that a server generates.

    Attributes:
        token_ids (`list[int]`):
            The tokens of a probe, the same at all times.
        logprobs (`torch.Tensor`, *optional*):
            What the servers, or else the policy, compute for all of them but the first with `version`, in nats;
            `None` if nobody has.
        bound (`float`):
            Mean difference in nats per token from which on a probe has found another model; see `bound_of_probe`.
        is_quantized (`bool`):
            Whether servers compute another model than the policy by design.
    """

    def __init__(self, needs: ServerNeeds, is_compared: bool) -> None:
        count = max(min(_NUM_TOKENS, needs.context_length - 1), 2)
        vocabulary, generator = len(cast(Sized, needs.tokenizer)), torch.Generator().manual_seed(0)
        self.token_ids: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
        self.bound, self.is_quantized = _OTHER_MODEL, False
        self.logprobs: torch.Tensor | None = None
        self.version: str | None = None
        self.is_compared = is_compared

    @property
    def is_missing(self) -> bool:
        """
        Whether no server has the current version, and so the policy must say what one that comes back is to compute.

        A quantized one computes something else by design: the first is compared with nothing, and the next with it.
        """
        return self.is_compared and not self.is_quantized and self.logprobs is None

    def set(self, version: str | None, logprobs: torch.Tensor | None) -> None:
        """Compare with these from now on."""
        self.version, self.logprobs = version, logprobs

    def compare(self, url: str, version: str | None, logprobs: torch.Tensor) -> None:
        """
        Raise unless a server computes what the others do.

        Raises:
            ValueError: if it computes another model.
            ServerLostError: if nobody has computed anything with this version yet.
        """
        if not self.is_compared or version is None:
            return
        if self.version != version or self.is_missing:
            raise ServerLostError(f"{url} is admitted later: there is nothing to compare it with yet.")
        if self.logprobs is None:
            self.logprobs = logprobs
        difference = float((logprobs - self.logprobs).abs().mean())
        if not difference <= self.bound:
            raise ValueError(
                f"The vLLM server at {url} computes another model than the others or the policy, or than "
                f"before it was started anew: {difference:.3f} nats per token apart. Compare model, revision "
                "and number type of the servers."
            )

    def check_policy(self, logprobs: torch.Tensor) -> bool:
        """
        Raise if the servers compute another model than the policy.

        Args:
            logprobs (`torch.Tensor`):
                What the policy computes.

        Returns:
            `bool`: whether there was something to compare.

        Raises:
            ValueError: for a mean difference in nats per token that no rounding makes.
        """
        if self.logprobs is None:
            return False
        difference = float((logprobs - self.logprobs).abs().mean())
        if not self.is_quantized and not difference <= self.bound:
            raise ValueError(
                f"The vLLM servers compute another model than the policy: {difference:.3f} nats per token apart with "
                "the same adapter or weights. Compare model, revision and number type; restart a server that another "
                "training has given its weights. `engine_check='off'` does not look."
            )
        return True


async def probe_logprobs(server: ServerConnection, model: str, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, as a server computes them at temperature 1."""
    options = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
    body = {"model": model, "token_ids": token_ids, "sampling_params": options}
    found = (await server.post(GENERATE, body))["prompt_logprobs"]
    scored = zip(found[1:], token_ids[1:], strict=True)
    return torch.tensor([position[str(token)]["logprob"] for position, token in scored], dtype=torch.float64)


def policy_logprobs(model: torch.nn.Module, token_ids: list[int], device: torch.device) -> torch.Tensor:
    """The same by the policy without dropout. All processes call it together."""
    is_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([token_ids], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    finally:
        for module, mode in is_training:
            module.training = mode
    return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].double().cpu()


def bound_of_probe(*dtypes: torch.dtype) -> float:
    """Mean difference in nats per random token that no rounding makes, between models of these number types."""
    return _OTHER_MODEL if set(dtypes) <= {torch.float32, torch.float64} else _OTHER_MODEL_IN_16_BITS
