"""
vLLM's importance ratio from the update's own forward pass.

`GRPOTrainer` forwards a batch once more to compare vLLM's log-probabilities with the policy's. Where one optimizer
step trains on a batch, the policy is still the one that the update forwards, so that pass tells them too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from treepo_trl.policy.engine import PolicyEngine
from treepo_trl.trl import seams
from treepo_trl.trl.host import Host


RATIO = "importance_sampling_ratio"


class ImportanceRatio:
    """
    The ratios of the batches that one optimizer step trains on.

    Args:
        host ([`Host`]):
            Says how ratios are cut off, and logs them.
        engine ([`PolicyEngine`]):
            Compares its log-probabilities with the policy's.
    """

    def __init__(self, host: Host, engine: PolicyEngine) -> None:
        self._host, self._engine = host, engine
        self._inputs: dict[str, Any] | None = None
        self._seen: list[dict[str, torch.Tensor]] = []

    @property
    def comes_from_the_update(self) -> bool:
        """Whether a batch is trained on before the policy changes."""
        args = self._host.args
        return self._is_wanted and args.gradient_accumulation_steps % args.micro_steps_per_batch == 0

    @property
    def _is_wanted(self) -> bool:
        trainer = self._host.trainer
        return trainer.use_vllm and trainer.vllm_importance_sampling_correction

    def scoring(self) -> AbstractContextManager[None]:
        """Context in which `GRPOTrainer` scores a batch without that forward pass."""
        self._seen = []
        return seams.no_correction(self._host.trainer) if self.comes_from_the_update else nullcontext()

    def scored(self, batch: dict[str, torch.Tensor]) -> None:
        """Take vacant rows out of what `GRPOTrainer` has logged of the ratios of whole completions."""
        if RATIO in batch and batch[RATIO].size(1) == 1 and self._host.args.fallback_policy == "none":
            mask = batch["completion_mask"] * batch.get("tool_mask", 1)
            self._host.log_again(self._metrics(batch | {"completion_mask": mask}))

    @contextmanager
    def filled_in(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Context in which `GRPOTrainer` computes the loss of a micro-batch, whose ratio [`see`] puts there."""
        is_missing = self._is_wanted and RATIO not in inputs and self._host.model.training
        self._inputs = inputs if is_missing else None
        try:
            yield
        finally:
            self._inputs = None

    def see(self, logps: torch.Tensor) -> None:
        """
        Take log-probabilities `(B, T)` of the policy, and tell of the batch with its last micro-batch.

        Raises:
            RuntimeError: if `engine_check` is `"error"` and the engine did not compute the policy.
        """
        inputs = self._inputs
        if inputs is None:
            return
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        difference = logps.detach() - inputs["sampling_per_token_logps"]
        inputs[RATIO] = self._cut_off(torch.nan_to_num(difference * mask, nan=0.0))
        names = "completion_mask", "sampling_per_token_logps", RATIO
        seen = {name: inputs[name] for name in names} | {"completion_mask": mask}
        self._seen.append(seen | {"old_per_token_logps": logps.detach()})
        if len(self._seen) == self._host.args.steps_per_generation:
            batch = {name: torch.cat([each[name] for each in self._seen]) for name in self._seen[0]}
            self._seen = []
            self._host.log(self._metrics(batch) | self._engine.compare(batch))

    def _cut_off(self, difference: torch.Tensor) -> torch.Tensor:
        """Ratios `(B, T)`, or `(B, 1)` for whole completions, as `GRPOTrainer` cuts them off."""
        trainer = self._host.trainer
        level, _, how = trainer.vllm_importance_sampling_mode.partition("_")
        ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
        least, most = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
        if how == "truncate":
            return ratio.clamp(least, most)
        is_outside = torch.zeros_like(ratio, dtype=torch.bool)
        is_outside |= ratio < least if least is not None else False
        is_outside |= ratio > most if most is not None else False
        return ratio.masked_fill(is_outside, 0.0)

    def _metrics(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """What `GRPOTrainer` logs of the difference, under its names."""
        mask = batch["completion_mask"].bool()
        difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
        difference, ratio = difference[mask & ~difference.isnan()], batch[RATIO]
        ratios = ratio[mask.any(1)].flatten() if ratio.size(1) == 1 else ratio[mask]
        difference, ratios = (each if len(each) else each.new_zeros(1) for each in (difference, ratios))
        own = [difference.mean(), difference.max(), ratios.min(), ratios.mean(), ratios.max()]
        of_all = self._host.gathered(torch.stack(own)[None])
        sampling = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
        return {
            f"{sampling[0]}/mean": of_all[:, 0].mean().item(),
            f"{sampling[0]}/max": of_all[:, 1].max().item(),
            f"{sampling[1]}/min": of_all[:, 2].min().item(),
            f"{sampling[1]}/mean": of_all[:, 3].mean().item(),
            f"{sampling[1]}/max": of_all[:, 4].max().item(),
        }
