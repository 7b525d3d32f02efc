"""
A causal language model's log-probabilities and entropies over rows, each shared prefix forwarded once.

Stands in for `GRPOTrainer._get_per_token_logps_and_entropies` with the same results up to rounding.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger

from .packing import PackedRows, is_worth_packing, model_inputs, pack_rows


logger = get_logger(__name__)

_TOLERANCE = 1e-3  # nats, mean over a batch, in float32
_HALF_PRECISION_TOLERANCE = 0.1  # bfloat16 rounding alone gives about 0.02


class PackedForward:
    """
    Forwards chunks of rows as packed rows where that pays.

    Args:
        tree_packing (`str`):
            `"sdpa"` packs every chunk, `"auto"` those that share enough.
        accelerator ([`~accelerate.Accelerator`]):
            Gives autocast and unwraps the model.
        is_sharded (`bool`):
            Whether a forward is collective (FSDP, DeepSpeed). Then the first batch is not compared with plain rows,
            since processes must not run different numbers of forwards.

    Attributes:
        is_checked (`bool`):
            Whether a packed batch has been compared with its plain rows, which happens once.
    """

    def __init__(self, tree_packing: str, accelerator: Any, is_sharded: bool) -> None:
        self.tree_packing = tree_packing
        self.accelerator = accelerator
        self.is_sharded = is_sharded
        self.is_checked = False
        self._is_announced = False

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int,
        compute_entropy: bool,
        plain: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, list[float]]]:
        """
        Log-probabilities and entropies `(B, logits_to_keep)` of the last tokens of each row.

        Args:
            model:
                Policy or reference with TRL's fused LM head, wrapped or not.
            input_ids (`torch.Tensor` of shape `(B, L)`), attention_mask (`torch.Tensor` of shape `(B, L)`):
                Padded rows.
            logits_to_keep (`int`):
                Completion columns at the end of the rows.
            batch_size (`int`):
                Rows per forward.
            compute_entropy (`bool`):
                Whether to return entropies; otherwise `None`.
            plain (`Callable`):
                TRL's own method, for chunks that are not packed and for the check.

        Returns:
            Log-probabilities, entropies, and one value per chunk of `tree/packing_seconds` and `tree/packing_ratio`.

        Raises:
            RuntimeError: if the packed log-probabilities of the first packed chunk are not those of its plain rows.
        """
        all_logps, all_entropies = [], []
        log: dict[str, list[float]] = {"tree/packing_seconds": [], "tree/packing_ratio": []}
        chunks = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
        for chunk_ids, chunk_mask in chunks:
            started = time.perf_counter()
            packed = pack_rows(chunk_ids, chunk_mask, logits_to_keep)
            log["tree/packing_seconds"].append(time.perf_counter() - started)
            log["tree/packing_ratio"].append(packed.ratio)
            if self._is_packed(packed):
                self._check_once(model, packed, chunk_ids, chunk_mask, logits_to_keep, plain)
                logps, entropies = self._forward(model, packed)
            else:
                logps, entropies, _ = plain(
                    model, chunk_ids, chunk_mask, logits_to_keep, compute_entropy=compute_entropy
                )
            all_logps.append(logps)
            all_entropies.append(entropies)
        return torch.cat(all_logps), torch.cat(all_entropies) if compute_entropy else None, log

    def _is_packed(self, packed: PackedRows) -> bool:
        if self.tree_packing != "auto":
            return True
        is_packed = is_worth_packing(packed)
        if not self._is_announced:
            self._is_announced = True
            choice = "one packed row" if is_packed else "plain rows"
            logger.info(
                f"tree_packing='auto' forwards {choice}: {packed.num_row_tokens} tokens in rows, "
                f"{packed.input_ids.size(1)} unique (ratio {packed.ratio:.2f}). Decided anew for each micro-batch."
            )
        return is_packed

    def _forward(self, model: Any, packed: PackedRows) -> tuple[torch.Tensor, torch.Tensor | None]:
        base = self.accelerator.unwrap_model(model)
        inputs = model_inputs(packed, base.config._attn_implementation, base.dtype)
        with self.accelerator.autocast():
            outputs = model(**inputs, fused_lm_head=True)
        entropies = None if outputs.entropy is None else packed.unpack(outputs.entropy)
        return packed.unpack(outputs.log_probs), entropies

    @torch.no_grad()
    def _check_once(
        self,
        model: Any,
        packed: PackedRows,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        plain: Callable[..., Any],
    ) -> None:
        if self.is_checked or self.is_sharded:
            return
        self.is_checked = True
        module = self.accelerator.unwrap_model(model)
        was_training = module.training
        module.eval()  # dropout would make the two differ
        logps, _ = self._forward(module, packed)
        expected, _, _ = plain(module, input_ids, attention_mask, logits_to_keep, batch_size=1)
        module.train(was_training)
        if not packed.is_scored.any():
            return
        difference = (logps - expected).abs()[packed.is_scored].mean().item()
        is_exact = self.accelerator.mixed_precision == "no" and module.dtype == torch.float32
        tolerance = _TOLERANCE if is_exact else _HALF_PRECISION_TOLERANCE
        if not difference <= tolerance:  # not a number is no agreement either
            raise RuntimeError(
                "The packed forward does not reproduce this model's plain rows: log-probabilities differ by "
                f"{difference:.2g} nats on average, where rounding explains {tolerance:.2g}. Set `tree_packing='off'`."
            )
