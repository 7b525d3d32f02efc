"""Files of JSON lines: written whole or not at all, read without trust. Standard library only."""

import io
import json
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass


_short = reprlib.Repr()
_short.maxlevel = 1
shown = _short.repr
"""A value for an error, of one line whatever was read."""


def append(file: io.FileIO, data: bytes) -> None:
    """
    Write all of `data` to the end of an unbuffered file.

    What a full disk or an interrupt cuts off is removed again, so that no half line stands before the next one. A
    buffer would keep what could not be written, and fail with it once more when the file is closed.
    """
    start = file.seek(0, io.SEEK_END)
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:
        with suppress(OSError):  # a device is no file that can be cut
            file.truncate(start)
        raise


def parse_line(line: bytes) -> object:
    """
    The value of a JSON line.

    Raises:
        ValueError: if the line is no JSON, or names a field twice.
    """
    try:
        return json.loads(line.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON from character {error.pos} on ({error.msg}).") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the field {shown(name)} twice.")
    return fields


@dataclass(frozen=True)
class Kind:
    """What a field may hold."""

    holds: Callable[[object], bool]
    words: str
    """What errors say of it."""


# `bool` is an `int` in Python, not in JSON. Finite is said by comparison: `math.isfinite` raises for large integers.
COUNT = Kind(lambda value: type(value) is int and 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1")
NUMBER = Kind(
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max,
    "a finite number",
)
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a text")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
LIST = Kind(lambda value: isinstance(value, list), "a list")


def or_null(kind: Kind) -> Kind:
    """A kind of values, or `None`."""
    return Kind(lambda value: value is None or kind.holds(value), f"null or {kind.words}")


def check_fields(record: object, place: str, required: Collection[str], optional: Collection[str] = ()) -> None:
    """
    Check that a record is an object with all required fields and no unknown one.

    Args:
        record (`object`):
            What was read.
        place (`str`):
            Its name in errors.
        required (collection of `str`), optional (collection of `str`):
            Names of the fields.

    Raises:
        ValueError: naming the record and the field.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place} is {shown(record)}; it must be {OBJECT.words}.")
    names: set[object] = set(record)  # pyright: ignore[reportUnknownArgumentType]  # an object of JSON, or not even that
    for name in required:
        if name not in names:
            raise ValueError(f"{place} has no `{name}`.")
    known = {*required, *optional}
    for name in names - known:
        raise ValueError(f"{place} has an unknown field {shown(name)}; known are {', '.join(sorted(known))}.")


def check_value(value: object, name: str, kind: Kind) -> None:
    """
    Check what a field holds.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if not kind.holds(value):
        raise ValueError(f"`{name}` is {shown(value)}; it must be {kind.words}.")


def check_list(value: object, name: str, kind: Kind) -> None:
    """
    Check that a field holds a list, and what its items are.

    Raises:
        ValueError: naming the field, or the item of it, its value and what is allowed.
    """
    check_value(value, name, LIST)
    items: list[object] = value  # pyright: ignore[reportAssignmentType]
    for i, item in enumerate(items):
        if not kind.holds(item):
            check_value(item, f"{name}[{i}]", kind)
