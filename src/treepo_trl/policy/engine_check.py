"""
Whether the engine computes what the policy computes: in every batch, and with a moved adapter at the start.

A difference of the rounding's size is normal. A larger one trains on samples of another model, and no reward shows it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treepo_trl.engines import SamplingOptions
from treepo_trl.treepo_config import EngineCheck, TreePOConfig

from .adapter_probe import AdapterProbe


if TYPE_CHECKING:
    from peft import PeftConfig


logger = get_logger(__name__)

BOUNDS: Mapping[torch.dtype, float] = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest mean difference of log-probabilities in nats per token that is rounding; of two types the larger counts."""
_LARGE = 1.0  # nats: a token that is e times as likely in one of the two
_PADDING = -1  # no distance; NaN is one of a policy that gives no number
_REMEDY = (
    "Compare model, revision and number type of both; with a quantized model see `vllm_base_weights`. "
    "`vllm_lora_sync='merge'` gives the engine all weights instead of the adapter. `engine_check` says what happens "
    "then: 'error' stops here, 'warn' goes on."
)


def bound_of(*dtypes: torch.dtype) -> float:
    """Largest mean difference in nats per token that is rounding between models of these number types."""
    return max(BOUNDS.get(dtype, BOUNDS[torch.bfloat16]) for dtype in dtypes)


def computing_dtype(model: PreTrainedModel, accelerator: Accelerator) -> torch.dtype:
    """Number type that a model is forwarded in: that of mixed precision, else its own."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(accelerator.mixed_precision))
    return (mixed if accelerator.native_amp else None) or cast(torch.dtype, model.dtype)


def logprob_difference(output: Mapping[str, torch.Tensor], accelerator: Accelerator) -> torch.Tensor | None:
    """
    Distance of engine and policy for each sampled token of all processes, in nats, where `GRPOTrainer` has both.

    Args:
        output (`Mapping[str, torch.Tensor]`):
            What `_generate_and_score_completions` returns: log-probabilities and masks of shape `(B, T)`.
        accelerator ([`~accelerate.Accelerator`]):
            Gathers those of the other processes.

    Returns:
        `torch.Tensor` of shape `(tokens,)`, NaN where the policy gives no number; `None` without the
        log-probabilities of both.
    """
    policy, engine = output.get("old_per_token_logps"), output.get("sampling_per_token_logps")
    if policy is None or engine is None:
        return None
    mask = output["completion_mask"].bool()
    if output.get("tool_mask") is not None:
        mask = mask & output["tool_mask"].bool()
    mask = mask & ~engine.isnan()  # vLLM gives no number for tokens that it could not score
    own = (policy - engine).abs().float()[mask]
    own = torch.nn.functional.pad(own, (0, 1), value=_PADDING)  # never empty
    padded = accelerator.pad_across_processes(own, pad_index=_PADDING)
    gathered = cast(torch.Tensor, accelerator.gather(cast(torch.Tensor, padded)))
    return gathered[gathered != _PADDING]


class EngineWatch:
    """
    Tells, or raises, when an engine does not compute the policy.

    Args:
        mode (`str`):
            `engine_check` of [`TreePOConfig`].
        policy_dtype (`torch.dtype`), engine_dtype (`torch.dtype`):
            Number types in which the two compute.
        options ([`~treepo_trl.engines.SamplingOptions`]):
            How tokens are drawn.
        facts (`Callable`):
            What is known to differ between the two, in words. Asked when they do.

    Raises:
        ValueError: if `mode` is `"error"` and the two compute in different 16-bit types.
    """

    def __init__(
        self,
        mode: EngineCheck,
        policy_dtype: torch.dtype,
        engine_dtype: torch.dtype,
        options: SamplingOptions,
        facts: Callable[[], Sequence[str]],
    ) -> None:
        self.mode, self._facts = mode, facts
        self.bound = bound_of(policy_dtype, engine_dtype)
        self._types = _difference_of_types(policy_dtype, engine_dtype)
        self._is_comparable = not _leaves_tokens_out(options)
        self._told = 0.0  # the largest difference that was a warning
        if self._types and torch.float32 not in (policy_dtype, engine_dtype):
            self._tell(
                f"{self._types.capitalize()}. Set `bf16` or `fp16` to the engine's type, or give the engine the "
                'policy\'s (`vllm_engine_kwargs={"dtype": ...}`).',
                ValueError,
            )

    @property
    def is_on(self) -> bool:
        return self.mode != "off"

    def probed(self, probe: AdapterProbe) -> None:
        """
        Tell what a probe has found.

        Raises:
            RuntimeError: if `mode` is `"error"` and the engine does not compute the policy.
        """
        if probe.cause is not None:
            self._tell(f"A probe with a moved adapter: {probe}.{self._all_facts()} {_REMEDY}", RuntimeError)

    def batch(self, difference: torch.Tensor | None, is_older: bool = False) -> dict[str, float]:
        """
        Metrics of one batch; tells if its tokens were sampled from another model than the policy.

        Args:
            difference (`torch.Tensor` of shape `(tokens,)`, *optional*):
                What [`logprob_difference`] returns.
            is_older (`bool`, *optional*, defaults to `False`):
                Whether the tokens are from the policy before an update, so that a difference says nothing.

        Raises:
            RuntimeError: if `mode` is `"error"` and the mean difference is above the bound.
        """
        if difference is None or not len(difference):
            return {}
        mean, share = float(difference.mean()), float((~(difference <= _LARGE)).float().mean())
        # A tenth more each time: a difference that grows is told of again, one that stays is not.
        if not is_older and self._is_comparable and self.is_on and not mean <= max(self.bound, 1.1 * self._told):
            if math.isfinite(mean):
                self._told = mean
            self._tell(
                f"vLLM's log-probabilities of this batch differ from the policy's by {mean:.3f} nats per token on "
                f"average, {share:.1%} of the tokens by more than {_LARGE:g}. Rounding is below {self.bound:g}: the "
                f"engine does not compute the policy.{_without_number(difference)}{self._all_facts()} {_REMEDY}",
                RuntimeError,
            )
        return {
            "engine/logp_difference_mean": mean,
            "engine/logp_difference_p99": _quantile(difference, 0.99),
            "engine/logp_difference_above_1": share,
        }

    def _all_facts(self) -> str:
        facts = [*([self._types] if self._types else []), *self._facts()]
        return f" What differs: {'; '.join(facts)}." if facts else ""

    def _tell(self, message: str, error: type[Exception]) -> None:
        if self.mode == "error":
            raise error(message)
        if self.mode == "warn":
            logger.warning(message)


def dropout_of(model: torch.nn.Module) -> list[str]:
    """What a model drops in training, in words: `GRPOTrainer` computes the policy's log-probabilities with it."""
    names = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Dropout) and each.p > 0]
    if not names:
        return []
    return [
        f"the policy computes with dropout ({names[0]} and {len(names) - 1} more), the engine without: "
        "`disable_dropout=True` ends that"
    ]


def check_dropout(args: TreePOConfig, adapter: "PeftConfig") -> None:
    """
    Raise where every batch would be compared with a policy that its dropout makes another model.

    Raises:
        ValueError: if `engine_check` is `"error"` and the adapter has dropout.
    """
    dropout = float(getattr(adapter, "lora_dropout", 0.0))
    is_compared = args.use_vllm and args.engine_check == "error" and not _leaves_tokens_out(args.sampling_options())
    if is_compared and dropout > 0 and not args.disable_dropout:
        raise ValueError(
            f"`engine_check='error'`, but `lora_dropout` is {dropout:g}: the policy computes with dropout and vLLM "
            "without, and that would end the training. Set `lora_dropout` to 0, `disable_dropout=True`, or "
            "`engine_check='warn'`."
        )


def different_tokens(policy: PreTrainedTokenizerBase, engine: PreTrainedTokenizerBase) -> list[str]:
    """What two tokenizers mean differently by the same ids, in words."""
    ours, theirs = policy.get_vocab(), engine.get_vocab()
    others = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if not others:
        return []
    token = others[0]
    return [
        f"the tokenizers, in the ids of {len(others)} tokens ({token!r} is {ours[token]} in the policy and "
        f"{theirs[token]} in the engine)"
    ]


def _without_number(difference: torch.Tensor) -> str:
    share = float(difference.isnan().float().mean())
    return f" The policy gives no number for {share:.1%} of the tokens, as an overflow does." if share > 0 else ""


def _difference_of_types(policy: torch.dtype, engine: torch.dtype) -> str | None:
    if policy == engine:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (policy, engine)]
    return f"the policy computes in {names[0]} and the engine in {names[1]}"


def _leaves_tokens_out(options: SamplingOptions) -> bool:
    """Whether the engine's log-probabilities are not the policy's by design."""
    return options.top_p < 1 or options.top_k > 0 or bool(options.min_p) or options.repetition_penalty != 1


def _quantile(values: torch.Tensor, share: float) -> float:
    """
    The value that this share of the others does not exceed.

    `torch.quantile` takes 16 million at most, and `kthvalue` on CUDA is not deterministic.
    """
    return float(values.sort().values[max(math.ceil(share * len(values)), 1) - 1])
