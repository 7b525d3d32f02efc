"""Rows whose completion is masked are not forwarded."""

from collections.abc import Callable

import torch


Forwarded = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities and entropies `(B, T)`, and a load-balancing loss, as far as they were asked for."""


def forward_filled(
    forward: Callable[[torch.Tensor, torch.Tensor, int | None], Forwarded],
    is_filled: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    batch_size: int | None,
) -> Forwarded:
    """
    What a forward pass gives for the rows that are filled, 0 for the others.

    There are as many forward passes as for all rows, since processes that share a sharded model run them together. A
    chunk of which no row is filled forwards its first one.

    Args:
        forward (`Callable`):
            Takes rows, their mask, and rows per chunk.
        is_filled (`torch.Tensor` of shape `(B,)`):
            Whether a row has anything to be scored.
        input_ids (`torch.Tensor` of shape `(B, L)`), attention_mask (`torch.Tensor` of shape `(B, L)`):
            Padded rows.
        batch_size (`int`, *optional*):
            Rows per chunk; all in one by default.
    """
    if is_filled.all():
        return forward(input_ids, attention_mask, batch_size)
    found: list[Forwarded] = []
    for filled, ids, mask in zip(
        *(each.split(batch_size or len(each)) for each in (is_filled, input_ids, attention_mask)), strict=True
    ):
        rows = filled.nonzero().flatten() if filled.any() else filled.new_zeros(1, dtype=torch.long)
        logps, entropies, aux_loss = forward(ids[rows], mask[rows], len(rows))
        found.append(
            (_among(filled, rows, logps), None if entropies is None else _among(filled, rows, entropies), aux_loss)
        )
    logps, entropies, losses = zip(*found, strict=True)
    return (
        torch.cat(logps),
        None if entropies[0] is None else torch.cat(entropies),
        None if losses[0] is None else torch.stack(losses).mean(),
    )


def _among(is_filled: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values `(rows, T)` among all rows; 0 in those that are not filled."""
    found = values.new_zeros(len(is_filled), values.size(1)).index_copy(0, rows, values)
    return found * is_filled[:, None]
