"""docs/performance-gpu.md, from the files of the stages."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import table_head, table_row

from . import files
from .cases import Stage
from .files import StageFile


COMMAND = "python -m benchmarks.gpu_report"
_HEAD = f"""\
# Performance on GPUs

This page is made from the files in `benchmarks/data/gpu/`, one folder a card. Do not edit it.

```sh
make gpu-report
```

This runs the stages below on the card at hand and writes this page. A stage takes at most 8 minutes at a time. What
it has finished is kept, so a report may take several visits, and several cards. Models have random weights of the
sizes named, or are the packaged SmolLM2-135M-Instruct; nothing is downloaded. Checkpoints take 28 GB in `outputs/`.

```sh
{COMMAND} --stages kernels rollout   # these stages alone
{COMMAND} --retry                    # failed parts again
{COMMAND} --render                   # only this page
```

A cell holds the median, and the lowest and highest value where there are several. *Failed* and *cannot run* come with
the last line of the error or the reason. Figures of a processor are in [performance](performance.md).
"""
_SMOKE = "**Toy sizes on a processor: these figures show that the stages work, and nothing else.**\n"
_FACTS = ("memory", "compute capability", "CUDA", "threads")


def read_all(folder: Path, stages: Sequence[Stage]) -> list[dict[str, StageFile]]:
    """
    The files of each card, by stage. Cards are in the order of their folders.

    Raises:
        ValueError: for a file that is not the file of a stage.
    """
    cards: list[dict[str, StageFile]] = []
    for card in sorted(path for path in folder.glob("*") if path.is_dir()):
        paths = {stage.name: card / f"{stage.name}.json" for stage in stages}
        found = {name: files.read(path) for name, path in paths.items() if path.exists()}
        if found:
            cards.append(found)
    return cards


def render(folder: Path, stages: Sequence[Stage]) -> str:
    """
    The page.

    Args:
        folder (`Path`):
            Holds a folder for each card.
        stages (`Sequence[Stage]`):
            In the order of the page.
    """
    cards = read_all(folder, stages)
    parts = [_HEAD]
    if any(data["smoke"] for card in cards for data in card.values()):
        parts.append(_SMOKE)
    parts.append(_cards(cards) if cards else f"**Not measured yet.** Run `make gpu-report` or `{COMMAND}`.\n")
    parts += [_section(stage, [card[stage.name] for card in cards if stage.name in card]) for stage in stages]
    return "\n".join(parts)


def _cards(cards: list[dict[str, StageFile]]) -> str:
    """A line for each setting of machine, versions and code that figures were taken with."""
    lines = ["## Cards\n", table_head("card", "stages", "commit", "versions")]
    for card in cards:
        settings: dict[tuple[str, ...], list[str]] = {}
        for name, data in card.items():
            facts = [f"{fact} {data['machine'][fact]}" for fact in _FACTS if fact in data["machine"]]
            title = ", ".join([data["machine"]["card"], *facts])
            packages = ", ".join(f"{package} {number}" for package, number in data["versions"].items())
            settings.setdefault((title, data["commit"], packages), []).append(name)
        lines += [
            table_row(title, ", ".join(names), f"`{commit}`", packages)
            for (title, commit, packages), names in settings.items()
        ]
    return "\n".join(lines) + "\n"


def _section(stage: Stage, measured: list[StageFile]) -> str:
    """A stage's heading, command and table, a column for each card."""
    command = f"```sh\n{COMMAND} --stages {stage.name}\n```\n"
    lines = [f"## {stage.title}\n", f"{stage.about}\n", command]
    if not measured:
        lines.append("Not measured yet.\n")
        return "\n".join(lines)
    columns = [_column(stage, data) for data in measured]
    names = list(dict.fromkeys(row for column in columns for row in column))
    lines.append(table_head("", *(data["machine"]["card"] for data in measured)))
    lines += [table_row(name, *(column.get(name, "-") for column in columns)) for name in names]
    unfinished = [data["machine"]["card"] for data in measured if not data["is_finished"]]
    if unfinished:
        lines.append(f"\nNot finished yet: {', '.join(unfinished)}.")
    return "\n".join(lines) + "\n"


def _column(stage: Stage, data: StageFile) -> dict[str, str]:
    """Cells of one card by row."""
    cells = {row: _cell(values) for row, values in files.rows_of(data["cases"]).items()}
    medians = data["medians"]
    for name, above, below in stage.ratios:
        if above in medians and below in medians and medians[below]:
            cells[name] = number(medians[above] / medians[below])
    for name, outcome in data["cases"].items():
        if "failed" in outcome:
            cells[f"part `{name}`"] = f"failed: {outcome['failed']}"
        elif "cannot_run" in outcome:
            cells[f"part `{name}`"] = f"cannot run: {outcome['cannot_run']}"
    return cells


def _cell(values: list[float | str]) -> str:
    texts = list(dict.fromkeys(value for value in values if isinstance(value, str)))
    numbers = [value for value in values if not isinstance(value, str)]
    if not numbers:
        return ", ".join(texts)
    middle = number(statistics.median(numbers))
    spread = f" ({number(min(numbers))} to {number(max(numbers))})" if len(numbers) > 1 else ""
    return ", ".join([middle + spread, *texts])


def number(value: float) -> str:
    """
    Three digits, or all of a whole number's.

    >>> [number(each) for each in (0, 0.01234, 1.5, 12.34, 123.4, 12345.6)]
    ['0', '0.0123', '1.50', '12.3', '123', '12,346']
    """
    size = abs(value)
    if size == 0 or size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size < 0.1 else f"{value:.{1 if size >= 10 else 2}f}"
