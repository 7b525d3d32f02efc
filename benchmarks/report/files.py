"""The file of a stage on one card."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from .processes import Outcome


class StageFile(TypedDict):
    """What a stage's file holds."""

    stage: str
    smoke: bool
    """Whether the sizes are toys: such figures show that the stage works, and nothing else."""
    machine: dict[str, str]
    versions: dict[str, str]
    commit: str
    seeds: list[int]
    is_finished: bool
    """Whether every case is there."""
    cases: dict[str, Outcome]
    medians: dict[str, float]
    """Of each row with numbers, over all cases that have it."""


_KINDS: dict[str, type] = {
    "stage": str,
    "smoke": bool,
    "machine": dict,
    "versions": dict,
    "commit": str,
    "seeds": list,
    "is_finished": bool,
    "cases": dict,
    "medians": dict,
}


def new_file(stage: str, smoke: bool, machine: dict[str, str], versions: dict[str, str], commit: str) -> StageFile:
    """The file of a stage of which nothing has run."""
    return {
        "stage": stage,
        "smoke": smoke,
        "machine": machine,
        "versions": versions,
        "commit": commit,
        "seeds": [],
        "is_finished": False,
        "cases": {},
        "medians": {},
    }


def rows_of(cases: Mapping[str, Outcome]) -> dict[str, list[float | str]]:
    """Values of each row over all cases, in the order in which they came."""
    rows: dict[str, list[float | str]] = {}
    for outcome in cases.values():
        for row, values in outcome.get("rows", {}).items():
            rows.setdefault(row, []).extend(values)
    return rows


def medians_of(rows: Mapping[str, list[float | str]]) -> dict[str, float]:
    """Medians of the rows that hold numbers."""
    numbers = {row: [value for value in values if not isinstance(value, str)] for row, values in rows.items()}
    return {row: statistics.median(values) for row, values in numbers.items() if values}


def write(path: Path, data: StageFile) -> None:
    """Write a file whole, with its medians; one that is cut short never takes its place."""
    data["medians"] = medians_of(rows_of(data["cases"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(data, indent=1) + "\n")
    draft.replace(path)


def read(path: Path) -> StageFile:
    """
    Read a file.

    Raises:
        ValueError: if it is not the file of a stage; names the file and what is wrong.
    """
    try:
        data: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Remove it; the stage then runs again.") from None
    problem = _problem(data)
    if problem is not None:
        raise ValueError(f"{path} is not the file of a stage: {problem}. Remove it; the stage then runs again.")
    return data


def _problem(data: Any) -> str | None:
    if not isinstance(data, dict):
        return f"it holds {type(data).__name__}, not an object"
    for name, kind in _KINDS.items():
        if not isinstance(data.get(name), kind):
            return f"`{name}` is {data.get(name)!r}, expected {kind.__name__}"
    if "card" not in data["machine"]:
        return "`machine` names no card"
    for name, outcome in data["cases"].items():
        rows = outcome.get("rows") if isinstance(outcome, dict) else None
        if not isinstance(rows, dict) or not all(
            isinstance(values, list) and all(isinstance(value, int | float | str) for value in values)
            for values in rows.values()
        ):
            return f"case {name!r} has no rows of values"
    if data["medians"] != medians_of(rows_of(data["cases"])):
        return "`medians` are not those of its values"
    return None
