"""The logs of a run on a disk: from the state of its training, and after that from its tree log."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import cast

from treepo_trl.checkpoints import STATE_FILE
from treepo_trl.metrics import tree_metrics, tree_totals
from treepo_trl.sampling import SamplingStats, SegmentTree
from treepo_trl.sampling.json_lines import COUNT, OBJECT, check_list, check_value, parse_line
from treepo_trl.tree_log import TreeLogLine, logged_steps, read_trees

from .reward_signal import signal_metrics, signal_sums


@dataclass
class RunLogs:
    """What is on the disk of a run."""

    name: str
    """As the user has written it."""
    logs: list[Mapping[str, object]]
    """In the order of steps."""
    sources: list[str]
    """Where they come from, in words."""


def logs_of_run(name: str) -> RunLogs:
    """
    The logs of a run.

    A checkpoint and the end of a training keep all logs up to there. Steps after it, or all of them if there is none,
    are taken from the tree log, which knows rewards, lengths and ends of completions.

    Args:
        name (`str`):
            `output_dir` of the run, or a checkpoint in it.

    Raises:
        ValueError: if there is neither, or if one of them cannot be read, with file and field. `OSError` too.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"`{name}` is no folder. Name a run's `output_dir`, or a checkpoint in it.")
    logs: list[Mapping[str, object]] = []
    sources: list[str] = []
    step = 0
    state = _newest_state(folder)
    if state is not None:
        path, step, logs = state
        sources.append(f"{path.relative_to(folder)} up to step {step}")
    of_steps = [read_trees(path) for number, path in logged_steps(folder) if number >= step]
    # The lines of `treepo-trl sample` have no step.
    of_training = ([cast(TreeLogLine, line) for line in lines if "step" in line] for lines in of_steps)
    of_trees = [log_of_trees(lines) for lines in of_training if lines]
    if of_trees:
        logs = logs + of_trees
        sources.append(f"the tree log from step {of_trees[0]['step']} to {of_trees[-1]['step']}")
    if not logs:
        raise ValueError(
            f"`{name}` has no logs: neither a `{STATE_FILE}`, which checkpoints and the end of `treepo-trl train` "
            "write, nor a tree log, which `log_trees: true` writes."
        )
    return RunLogs(name, logs, sources)


# The state of a training


def _newest_state(folder: Path) -> tuple[Path, int, list[Mapping[str, object]]] | None:
    """The state that has come furthest: that of the last checkpoint or of the folder itself."""
    checkpoints = sorted(folder.glob(f"checkpoint-*/{STATE_FILE}"), key=_checkpoint_number)
    paths = [*checkpoints[-1:], *folder.glob(STATE_FILE)]
    return max(((path, *_read_state(path)) for path in paths), key=lambda state: state[1], default=None)


def _checkpoint_number(path: Path) -> int:
    number = path.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _read_state(path: Path) -> tuple[int, list[Mapping[str, object]]]:
    """Global step and logs."""
    try:
        state = parse_line(path.read_bytes())
        check_value(state, "the file", OBJECT)
        fields = cast("dict[str, object]", state)
        check_value(fields.get("global_step"), "global_step", COUNT)
        check_list(fields.get("log_history"), "log_history", OBJECT)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return cast(int, fields["global_step"]), cast("list[Mapping[str, object]]", fields["log_history"])


# The tree log


def log_of_trees(lines: list[TreeLogLine]) -> dict[str, float]:
    """
    What the trainer logs about the trees of a step, as far as they tell it.

    The log has rewards before they are scaled, so that a correlation with them is not quite the trainer's.
    """
    trees = [SegmentTree.from_dict(line["tree"]) for line in lines]
    rewards = [reward for line in lines for reward in line["rewards"] if reward is not None]
    log = {
        "step": lines[0]["step"] + 1,  # the log of a step comes after it
        **tree_metrics(tree_totals(trees, SamplingStats())),
        **signal_metrics(signal_sums(trees, [line["rewards"] for line in lines])),
    }
    if rewards:
        log["reward"] = fmean(rewards)
    if len(rewards) > 1:
        log["reward_std"] = stdev(rewards)
    return log
