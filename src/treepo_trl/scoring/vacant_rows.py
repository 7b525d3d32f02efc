"""
Rows that cost nothing: `GRPOTrainer` takes equally many rows for each prompt, and a tree may have fewer leaves.

A vacant row has one token, which is masked. Reward functions are not called for it, and its reward is `nan`, which TRL
leaves out of its means. What TRL counts all the same is put right here.
"""

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from treepo_trl.batch import TreeBatch
from treepo_trl.trl.host import Host


class LeafRows:
    """
    The rows among those of a batch that are leaves.

    Args:
        is_vacant (sequence of `bool`):
            For each row of this process.
    """

    def __init__(self, is_vacant: Sequence[bool]) -> None:
        self.is_vacant = list(is_vacant)

    def __len__(self) -> int:
        return self.is_vacant.count(False)

    def of(self, values: Sequence[Any]) -> list[Any]:
        """The values of these rows, from those of all."""
        return [value for value, vacant in zip(values, self.is_vacant, strict=True) if not vacant]

    def among_all(self, values: Sequence[Any], filler: object) -> list[Any]:
        """Values of all rows from those of these rows."""
        rest = iter(values)
        return [filler if vacant else next(rest) for vacant in self.is_vacant]

    def scored_by(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A reward function, or a reward model, that is called for these rows alone; the others get 0 for now."""
        if not any(self.is_vacant):
            return function
        if isinstance(function, torch.nn.Module):
            return _ModelOfLeafRows(function, self)

        def scored(**columns: Any) -> Any:
            own = {name: self.of(value) if isinstance(value, list) else value for name, value in columns.items()}
            return function(**own | {"log_extra": self._logging(columns["log_extra"])})

        async def scored_async(**columns: Any) -> Any:
            return self.among_all(await scored(**columns), 0.0)

        if inspect.iscoroutinefunction(function):
            return scored_async
        return lambda **columns: self.among_all(scored(**columns), 0.0)

    def _logging(self, log_extra: Callable[[str, list[Any]], None]) -> Callable[[str, list[Any]], None]:
        return lambda column, values: log_extra(column, self.among_all(values, None))


class _ModelOfLeafRows(torch.nn.Module):
    """A reward model over the rows that are leaves."""

    def __init__(self, model: torch.nn.Module, rows: LeafRows) -> None:
        super().__init__()
        self._model, self._rows = model, rows

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        """Logits `(B, labels)`, 0 in vacant rows."""
        is_leaf = ~torch.tensor(self._rows.is_vacant)
        given = {name: value[is_leaf.to(value.device)] for name, value in inputs.items()}
        logits = self._model(**given).logits
        found = logits.new_zeros(len(is_leaf), *logits.shape[1:])
        found[is_leaf.to(found.device)] = logits
        return SimpleNamespace(logits=found)


def generated(
    host: Host, batch: TreeBatch, generate: Callable[[list[Any]], tuple[Any, ...]]
) -> Callable[[list[Any]], tuple[Any, ...]]:
    """`GRPOTrainer._generate` for the rows of a batch, whose vacant rows are masked and no part of what it logs."""

    def generated(prompts: list[Any]) -> tuple[Any, ...]:
        prompt_ids, completion_ids, mask, *rest = generate(prompts)
        masks = [[1] * len(ids) for ids in completion_ids] if mask is None else mask
        ends = [*host.trainer.eos_token_ids, host.tokenizer.pad_token_id]
        own = [
            [is_vacant, len(prompt), sum(flags), ids[-1] not in ends]
            for is_vacant, prompt, flags, ids in zip(batch.is_vacant, prompt_ids, masks, completion_ids, strict=True)
        ]
        rows = host.gathered(torch.tensor(own, dtype=torch.long))
        if rows[:, 0].any():
            _log_leaves(host, rows)
            mask = [
                [0] * len(flags) if is_vacant else flags
                for is_vacant, flags in zip(batch.is_vacant, masks, strict=True)
            ]
        return prompt_ids, completion_ids, mask, *rest

    return generated


def _log_leaves(host: Host, rows: torch.Tensor) -> None:
    """Put right what `_generate` has logged; a row is: vacant or not, tokens of prompt and completion, cut off."""
    is_leaf = rows[:, 0] == 0
    host.count_tokens(-int(rows[~is_leaf, 1:3].sum()))
    _, _, lengths, is_truncated = rows[is_leaf].unbind(1)
    metrics = {"completions/clipped_ratio": is_truncated.float().mean().item()}
    terminated = lengths[is_truncated == 0]
    for name, values in (("", lengths), ("terminated_", terminated if len(terminated) else lengths.new_zeros(1))):
        metrics[f"completions/mean_{name}length"] = values.float().mean().item()
        metrics[f"completions/min_{name}length"] = float(values.min())
        metrics[f"completions/max_{name}length"] = float(values.max())
    calls = host.last_logged("tools/call_frequency")
    if calls is not None:
        metrics["tools/call_frequency"] = calls * len(rows) / int(is_leaf.sum())
    host.log_again(metrics)
