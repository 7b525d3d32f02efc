"""
Where a task is decided: resolved variance by depth early and late in the trainings of `benchmarks.learning`.

    python -m benchmarks.where_decided outputs/benchmarks/learning --arm sqrt-16 --plot where-decided.png

A bar is the share of the outcome's variance that the segments of a depth decide, in the mean over all runs of an arm:
from the statistics of the first steps, and from those that the last step had.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.common import make_parser, table_head, table_row
from benchmarks.learning_tasks import TASKS


METRIC = "tree/resolved_variance/"


def shares(log: dict[str, float]) -> np.ndarray:
    """`(depth,)`: resolved variance of each depth over that of all; what chance made negative is 0."""
    values = {int(name.removeprefix(METRIC)): value for name, value in log.items() if name.startswith(METRIC)}
    row = np.array([max(values.get(depth, 0.0), 0.0) for depth in range(max(values) + 1)])
    return row / max(row.sum(), 1e-12)


def mean_shares(results: list[dict], step: int) -> np.ndarray:
    """Mean over runs at a step of each."""
    rows = [shares(result["log"][min(step, len(result["log"]) - 1)]) for result in results]
    depth = max(map(len, rows))
    return np.mean([np.pad(row, (0, depth - len(row))) for row in rows], axis=0)


def main() -> None:
    """Print a table and draw the picture."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arm", default="sqrt-16")
    parser.add_argument("--early", type=int, default=8, help="step whose statistics stand for the start")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for task in TASKS:
        files = sorted(options.folder.glob(f"{task}-{options.arm}-[0-9]*/result.json"))
        results = [json.loads(file.read_text()) for file in files]
        if results:
            found[task] = mean_shares(results, options.early), mean_shares(results, -1)
    for task, (early, late) in found.items():
        print(f"\n`{task}`\n")
        print(table_head("depth", *range(len(early))))
        print(table_row("first steps", *(f"{value:.2f}" for value in early)))
        print(table_row("at the end", *(f"{value:.2f}" for value in late)))
    if options.plot is not None:
        draw(found, options.plot)


def draw(found: dict[str, tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    """A panel per task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(5 * len(found), 3.5), squeeze=False)
    for panel, (task, bars) in zip(panels[0], found.items(), strict=True):
        for i, (name, values) in enumerate(zip(("first steps", "at the end"), bars, strict=True)):
            panel.bar(np.arange(len(values)) + 0.4 * i, values, 0.4, label=name)
        panel.set(title=task, xlabel="depth of the segment", ylabel="share of the variance decided")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
