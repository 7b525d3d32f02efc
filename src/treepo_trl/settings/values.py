"""What a field of settings may hold: types, choices and ranges, for all dataclasses of settings."""

import sys
from collections.abc import Callable, Collection, Mapping
from inspect import get_annotations
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Literal, Union, cast, get_args, get_origin


Ranges = Mapping[str, tuple[Callable[[float], bool], str]]
"""By the name of a field: whether a number is allowed, and in words which are."""


def check_fields(settings: object, owner: type, ranges: Ranges) -> None:
    """
    Raise unless each field that `owner` declares holds what its annotation says, and a number that `ranges` allows.

    Args:
        settings (`object`):
            The values.
        owner (`type`):
            Class of `settings`, or a base of it. Fields of other classes are left out.
        ranges ([`Ranges`]):
            Ranges of any fields.

    Raises:
        TypeError: for a value of another type. `ValueError` for an unknown choice, and for a number that is not finite
            or outside of its range.
    """
    for name, kind in get_annotations(owner).items():
        check_kind(name, getattr(settings, name), kind)
    check_ranges(settings, ranges)


def check_ranges(settings: object, ranges: Ranges) -> None:
    """Raise a `ValueError` unless each number is within its range. No value has none."""
    for name, (is_allowed, allowed) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not is_allowed(value):
            raise ValueError(f"`{name}` is {value}; it must be {allowed}.")


def check_kind(name: str, value: object, kind: object) -> None:
    """Raise unless `value` is what the annotation `kind` says. Lists and dictionaries are not looked at."""
    options = members(kind)
    if value is None and NoneType in options:
        return
    if isinstance(value, str) and str in options:  # which texts, its config says
        return
    if get_origin(options[0]) is Literal:
        check_choice(name, value, get_args(options[0]))
    for option, check in ((bool, check_bool), (float, check_number), (int, check_int), (str, check_text)):
        if options[0] is option:
            check(name, value)


def members(kind: object) -> tuple[object, ...]:
    """The types of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise a `ValueError` unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}. Choose one of {', '.join(map(repr, choices))}.")


def check_int(name: str, value: object) -> int:
    """The value. Raises a `TypeError` unless it is a whole number."""
    if not isinstance(value, Integral) or isinstance(value, bool):  # numpy's too
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be a whole number.")
    return int(value)


def check_number(name: str, value: object) -> None:
    """Raise a `TypeError` unless `value` is a number, and a `ValueError` unless it is finite."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be a number.")
    if (
        not -sys.float_info.max <= cast(float, value) <= sys.float_info.max
    ):  # nor is a whole number too large for a float
        raise ValueError(f"`{name}` is {value}; it must be a finite number.")


def check_bool(name: str, value: object) -> None:
    """Raise a `TypeError` unless `value` is true or false. Python takes any text for true."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be true or false.")


def check_text(name: str, value: object) -> None:
    """Raise a `TypeError` unless `value` is text."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be text.")
