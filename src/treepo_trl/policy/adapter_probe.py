"""
Whether an engine serves all of an adapter: asked with an adapter that is not zero.

A fresh LoRA adapter computes nothing, so an engine that ignores it is right until it is trained. The probe moves the
factors that are zero at the start by random values, gives that to the engine, and compares log-probabilities.
Afterwards model, engine and generators are as they were.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from accelerate.utils import gather_object

from treepo_trl.engines import SegmentEngine, SegmentRequest, SegmentResult
from treepo_trl.trl.generation import own_draws

from .lora_factors import MovableFactors


if TYPE_CHECKING:
    from peft import PeftModel


Sample = Callable[[list[list[int]]], list[SegmentResult]]
"""Continues prompts with the engine, in their order, at temperature 1 and with no token left out."""
Cause = Literal["base", "adapter", "modules", "prefix cache", "unknown", "unmoved"]

PROBE_TOKENS = 32  # per prompt; four prompts make an ignored kind of module stand out of bfloat16's rounding
_NUM_PROMPTS = 4
_LONGEST_PROMPT = 512  # tokens
_MOVEMENT = 0.5  # nats per token: far above rounding, and the text stays likely
_SIGNIFICANT = 4.0  # standard deviations
_REPEATS = 8  # of each prompt: enough that tokens come again in the same place


@dataclass(frozen=True)
class AdapterProbe:
    """What a probe has found."""

    before: float
    """Mean difference of log-probabilities with the adapter as it is, in nats per token."""
    moved: float
    """The same with the moved adapter."""
    movement: float
    """How far the move has brought the policy itself, in nats per token."""
    cause: Cause | None
    """Why the engine does not compute the policy; `None` if it does."""
    ignored: tuple[str, ...] = ()
    """Modules whose adapter the engine leaves out, or kinds of modules (`*.q_proj`) where all of a kind are."""

    def __str__(self) -> str:
        figures = f"{self.before:.4f} nats per token with the adapter as it is, {self.moved:.4f} with a moved one"
        return f"{_WORDS[self.cause].format(modules=_listed(self.ignored))} (difference: {figures})"


_WORDS: dict[Cause | None, str] = {
    None: "the engine computes the policy",
    "base": "the engine computes another model than the policy, whatever the adapter",
    "adapter": "the engine leaves out the adapter, or keeps an old one",
    "modules": "the engine leaves out a part of the adapter: {modules}",
    "prefix cache": "the engine keeps cached prefixes of an old adapter",
    "unknown": "the engine computes something else with an adapter that is not zero",
    "unmoved": "a random adapter does not move the policy itself: it is disabled, merged or without effect",
}


def probe_adapter(
    model: "PeftModel",
    sync: Callable[[], None],
    sample: Sample,
    prompts: list[list[int]],
    *,
    bound: float,
    seed: int = 0,
) -> AdapterProbe:
    """
    Move a LoRA adapter in policy and engine alike, and compare what they compute.

    All processes of a distributed training call it together, and find the same. Weights that are split over processes
    (FSDP, DeepSpeed) cannot be moved so.

    Args:
        model ([`~peft.PeftModel`]):
            The policy, on one device, with an active LoRA adapter.
        sync (`Callable`):
            Gives the engine the adapter that `model` holds.
        sample (`Callable`):
            Samples with the engine; see [`segments_of`].
        prompts (`list[list[int]]`):
            Token ids to continue, the same in all processes that share an engine. A stale prefix cache shows where
            they are longer than one of its blocks.
        bound (`float`):
            Largest mean difference that is rounding, in nats per token.
        seed (`int`):
            Of the move and of what is sampled.

    Raises:
        ValueError: if the model has no LoRA layers.
    """
    with _as_it_was(model, seed), torch.no_grad():
        factors = MovableFactors(model, seed)
        try:
            return _Probe(model, factors, sync, sample, prompts, bound).run()
        finally:
            factors.give_back()
            sync()


def segments_of(
    engine: SegmentEngine, prompts: list[list[int]], max_tokens: int = PROBE_TOKENS
) -> list[SegmentResult]:
    """One segment for each prompt, in their order."""
    requests = [SegmentRequest(i, ids, max_tokens, tree=i) for i, ids in enumerate(prompts)]
    return sorted(engine.complete(requests), key=lambda result: result.request_id)


def probe_prompts(prompts: list[list[int]], context_length: int | None, block_size: int | None) -> list[list[int]]:
    """A few of these prompts, repeated so that each fills a block of the prefix cache where the context allows."""
    longest = min((context_length or _LONGEST_PROMPT) - PROBE_TOKENS, _LONGEST_PROMPT)
    wanted = (block_size or 1) + 1
    repeated = [ids * math.ceil(wanted / len(ids)) for ids in prompts[:_NUM_PROMPTS]]
    return [ids[:longest] for ids in repeated]


class _Probe:
    """The measurements, and what follows from them."""

    def __init__(
        self,
        model: "PeftModel",
        factors: MovableFactors,
        sync: Callable[[], None],
        sample: Sample,
        prompts: list[list[int]],
        bound: float,
    ) -> None:
        self.model, self.factors, self.sync = model, factors, sync
        self.sample, self.prompts, self.bound = sample, prompts, bound

    def run(self) -> AdapterProbe:
        results, before = self._compared()
        if before <= self.bound or self.factors.are_zero:
            return self._moved(results, before)
        # The base, or what the engine makes of this adapter: without the adapter it is the base alone.
        self.factors.start_from_zero()
        found = self._moved(*self._compared())
        return replace(found, before=before, cause=found.cause or "unknown")

    def _compared(self) -> tuple[list[SegmentResult], float]:
        """What the engine samples with the adapter that the policy has, and how far the two are apart."""
        self.sync()
        results = self.sample(self.prompts)  # also fills the prefix cache
        return results, _mean(self._policy(self.prompts, results) - _logprobs(results))

    def _moved(self, results: list[SegmentResult], before: float) -> AdapterProbe:
        is_right = before <= self.bound  # no number is no agreement
        earlier = {} if is_right else dict(self._places(self._repeated()))
        movement = self._move(results)
        self.sync()
        results = self.sample(self.prompts)
        policy = self._policy(self.prompts, results)
        difference = _logprobs(results) - policy
        moved = _mean(difference)
        if movement < 0.1 * _MOVEMENT:
            return AdapterProbe(before, moved, movement, "unmoved")
        if not is_right:
            return AdapterProbe(before, moved, movement, "adapter" if self._has_stayed(earlier) else "base")
        kinds = self.factors.kinds
        ignored = self._ignored(kinds, results, policy, difference)
        cause: Cause | None = None
        if ignored or not moved <= self.bound:
            cause, ignored = self._cause(ignored, results, policy, difference)
        return AdapterProbe(before, moved, movement, cause, tuple(ignored))

    def _move(self, results: list[SegmentResult]) -> float:
        """Move the adapter until it moves the policy's log-probabilities of these tokens enough; how far it did."""
        start = self._policy(self.prompts, results)

        def moved(scale: float) -> float:
            self.factors.move(self.factors.names, scale)
            return _mean(self._policy(self.prompts, results) - start)

        scale, movement = 1e-3, 0.0
        small, large = 0.0, math.inf  # the largest scale that was too small, the smallest that was too large
        for _ in range(12):
            movement = moved(scale)
            if 0.5 * _MOVEMENT <= movement <= 2 * _MOVEMENT:
                return movement
            small, large = (scale, large) if movement < _MOVEMENT else (small, scale)  # NaN is too large
            if small > 0.0 and large < math.inf:
                scale = math.sqrt(small * large)
            else:
                scale *= min(max(_MOVEMENT / max(movement, 1e-9), 0.1), 10.0) if movement == movement else 0.1
        if large < math.inf:  # a policy that jumps: too far tells more than not far enough
            movement = moved(large)
        return moved(small) if movement != movement and small > 0.0 else movement

    def _ignored(
        self,
        groups: dict[str, list[str]],
        results: list[SegmentResult],
        policy: torch.Tensor,
        difference: torch.Tensor,
    ) -> list[str]:
        """
        Groups of modules whose move the engine has not made.

        Without such a group the policy would compute what the engine does, so the difference has the group's effect in
        it, once. Other differences and rounding do not go along with the effect, and average out over the tokens.
        """
        found = []
        for name, members in groups.items():
            self.factors.restore(members)
            effect = self._policy(self.prompts, results) - policy
            self.factors.move(members)
            products = difference @ effect, effect @ effect, difference @ difference
            along, effects, differences, count = _summed([*map(float, products), float(len(effect))])
            if along > 0.5 * effects > 0 and along > _SIGNIFICANT * (effects * differences / count) ** 0.5:
                found.append(name)
        return found

    def _cause(
        self, kinds: list[str], results: list[SegmentResult], policy: torch.Tensor, difference: torch.Tensor
    ) -> tuple[Cause, list[str]]:
        fresh = [ids[-1:] + ids[:-1] for ids in self.prompts]  # nothing of these is cached
        others = self.sample(fresh)
        again = _mean(_logprobs(others) - self._policy(fresh, others))
        if again <= self.bound and again < 0.5 * _mean(difference):
            return "prefix cache", []
        if self._keeps_the_old(results, difference):
            return "adapter", []
        rest = {name: [name] for kind, names in self.factors.kinds.items() if kind not in kinds for name in names}
        modules = self._ignored(rest, results, policy, difference)
        return ("modules" if kinds or modules else "unknown"), [*kinds, *modules]

    def _keeps_the_old(self, results: list[SegmentResult], difference: torch.Tensor) -> bool:
        """Whether the engine computes what the policy computed before the move."""
        self.factors.restore(self.factors.names)
        left = _mean(_logprobs(results) - self._policy(self.prompts, results))
        self.factors.move(self.factors.names)
        return left <= self.bound and left < 0.5 * _mean(difference)

    def _has_stayed(self, earlier: dict[tuple[int, ...], float]) -> bool:
        """
        Whether the engine computes what it computed before the move, whatever that was.

        Only the engine knows that, and it says no more than the tokens that it draws. So those are compared that it
        has drawn in the same place both times.
        """
        results = self._repeated()
        prompts = [ids for ids in self.prompts for _ in range(_REPEATS)]
        moved = self._policy(prompts, results)
        self.factors.restore(self.factors.names)
        effects = self._policy(prompts, results) - moved
        self.factors.move(self.factors.names)
        pairs = [
            (logprob - earlier[place], effect)
            for (place, logprob), effect in zip(self._places(results), effects.tolist(), strict=True)
            if place in earlier
        ]
        changes, effects = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T
        change, effect = _mean(changes), _mean(effects)
        return change <= self.bound and change < 0.5 * effect

    def _repeated(self) -> list[SegmentResult]:
        """Several continuations of each prompt."""
        return self.sample([ids for ids in self.prompts for _ in range(_REPEATS)])

    def _places(self, results: list[SegmentResult]) -> Iterator[tuple[tuple[int, ...], float]]:
        """Each sampled token behind all that is before it, and its log-probability."""
        for i, result in enumerate(results):
            path = (*self.prompts[i // _REPEATS], *result.token_ids)
            first = len(path) - len(result.token_ids) + 1
            for n, logprob in enumerate(result.logprobs):
                yield path[: first + n], logprob

    def _policy(self, prompts: list[list[int]], results: list[SegmentResult]) -> torch.Tensor:
        """The policy's log-probabilities of this process's sampled tokens, on the CPU: shape `(tokens,)`."""
        rows = [ids + result.token_ids for ids, result in zip(prompts, results, strict=True)]
        longest = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = []
        for row, prompt, result in zip(logits, prompts, results, strict=True):
            first = len(prompt) - 1
            logprobs = row[first : first + len(result.token_ids)].float().log_softmax(-1)
            tokens = torch.tensor(result.token_ids, device=device)
            found.append(logprobs.gather(1, tokens[:, None])[:, 0].cpu().double())
        return torch.cat(found)


@contextmanager
def _as_it_was(model: "PeftModel", seed: int) -> Iterator[None]:
    """Without dropout and with own draws for a block."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # In evaluation bitsandbytes packs 4-bit weights anew on processors with bfloat16.
        if not hasattr(getattr(module, "weight", None), "quant_state"):
            module.training = False
    try:
        with own_draws(seed):
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def _logprobs(results: list[SegmentResult]) -> torch.Tensor:
    return torch.tensor([value for result in results for value in result.logprobs], dtype=torch.float64)


def _summed(values: list[float]) -> list[float]:
    """Sums over processes."""
    return [sum(column) for column in zip(*gather_object([values]), strict=True)]


def _mean(differences: torch.Tensor) -> float:
    """Mean absolute value over the tokens of all processes; no number if there are none."""
    total, count = _summed([float(differences.abs().sum()), float(len(differences))])
    return total / count if count else math.nan


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
