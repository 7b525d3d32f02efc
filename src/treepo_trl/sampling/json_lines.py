"""Files of JSON lines: written whole or not at all, read without trust. Standard library only."""

import io
import json
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress


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
        raise ValueError(f"it has the field {reprlib.repr(name)} twice.")
    return fields


# What a field may hold. `bool` is an `int` in Python, not in JSON.


def is_count(value: object) -> bool:
    """Whether a value is a whole number, 0 or more."""
    return type(value) is int and value >= 0


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    # By comparison: `math.isfinite` raises for integers that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_text(value: object) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


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
        raise ValueError(f"{place} is {reprlib.repr(record)}; it must be an object.")
    names: set[object] = set(record)  # pyright: ignore[reportUnknownArgumentType]  # an object of JSON, or not even that
    for name in required:
        if name not in names:
            raise ValueError(f"{place} has no `{name}`.")
    known = {*required, *optional}
    for name in names - known:
        raise ValueError(f"{place} has an unknown field {reprlib.repr(name)}; known are {', '.join(sorted(known))}.")


def check_value(value: object, name: str, holds: Callable[[object], bool], allowed: str) -> None:
    """
    Check a value by a predicate.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if not holds(value):
        raise ValueError(f"`{name}` is {reprlib.repr(value)}; it must be {allowed}.")


def check_list(value: object, name: str, holds: Callable[[object], bool], allowed: str) -> None:
    """
    Check that a value is a list, and its items by a predicate.

    Raises:
        ValueError: naming the field, or the item of it, its value and what is allowed.
    """
    check_value(value, name, lambda value: isinstance(value, list), "a list")
    items: list[object] = value  # pyright: ignore[reportAssignmentType]
    for i, item in enumerate(items):
        if not holds(item):
            check_value(item, f"{name}[{i}]", holds, allowed)
