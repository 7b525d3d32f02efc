"""Results of `treepo-trl eval`: means over prompts with their intervals, as data and as a table."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from treepo_trl.apps.sample.cost_table import markdown_table
from treepo_trl.evaluation import estimates


PromptValues = Sequence[Mapping[str, float] | None]


def results_of(
    values: Mapping[str, PromptValues],
    adapters: Mapping[str, str | None],
    about: Mapping[str, object],
) -> dict[str, Any]:
    """
    What results.json holds.

    A prompt that lacks a score in one column is left out of all, so that columns are compared on the same prompts.

    Args:
        values (mapping of `str` to sequences):
            For each column a mapping per prompt, from the metrics to their values; `None` for an unscored prompt.
        adapters (mapping of `str` to `str` or `None`):
            Adapter of each column.
        about (mapping of `str` to `object`):
            Further entries.

    Raises:
        ValueError: if no prompt has all its scores.
    """
    per_prompt = list(zip(*values.values(), strict=True))
    scored = [i for i, row in enumerate(per_prompt) if all(cell is not None for cell in row)]
    if not scored:
        raise ValueError("No prompt has a score for each of its completions. See what the reward functions return.")
    columns: dict[str, Any] = {}
    first: dict[str, list[float]] = {}
    for number, column in enumerate(values):
        rows = [row for i in scored if (row := values[column][i]) is not None]
        by_metric = {name: [row[name] for row in rows] for name in rows[0]}
        columns[column] = {
            "adapter": adapters[column],
            "metrics": {name: asdict(estimate) for name, estimate in estimates(by_metric).items()},
            "per_prompt": by_metric,
        }
        if number == 0:
            first = by_metric
        else:  # of the same prompts: what makes one harder than another falls out
            difference = {
                name: [a - b for a, b in zip(own, first[name], strict=True)] for name, own in by_metric.items()
            }
            columns[column]["difference"] = {
                name: asdict(estimate) for name, estimate in estimates(difference).items()
            }
    return {**about, "num_prompts": len(scored), "left_out": len(per_prompt) - len(scored), "columns": columns}


def results_table(results: Mapping[str, Any]) -> str:
    """Markdown table: a row per metric, a column per model with 95 % intervals, and differences from the first."""
    columns: dict[str, Any] = results["columns"]
    first, *others = columns
    if results["left_out"]:
        print(f"{results['left_out']} prompts without a score are left out.", file=sys.stderr)
    head = [f"{results['num_prompts']} prompts", *columns, *(f"{name} - {first}" for name in others)]
    rows = [head]
    for metric in columns[first]["metrics"]:
        cells = [_cell(columns[name]["metrics"][metric], metric, "") for name in columns]
        cells += [_cell(columns[name]["difference"][metric], metric, "+") for name in others]
        rows.append([metric, *cells])
    return markdown_table(rows)


def _cell(estimate: Mapping[str, float], metric: str, sign: str) -> str:
    form = f"{sign}.1f" if metric == "tokens" else f"{sign}.3f"
    value, low, high = (format(estimate[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
