"""One message style for every bad argument: ``name: got what came, expected what is right``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

__all__ = ["BadType", "BadValue", "FastSAEError", "check_choice", "check_number", "check_type", "reject"]


class FastSAEError(Exception):
    """Base of every error this package raises on purpose."""


class BadValue(FastSAEError, ValueError):
    """An argument of the right type whose value can't be used."""


class BadType(FastSAEError, TypeError):
    """An argument of the wrong type."""


def reject(name: str, got: object, expected: str) -> NoReturn:
    """Raise :class:`BadValue` in the house style."""
    raise BadValue(f"{name}: got {got}, expected {expected}")


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise :class:`BadType` unless ``value`` is one of ``kinds`` (a bool is never a number)."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise BadType(f"{name}: got {type(value).__name__}, expected {expected}")


def check_number(
    name: str,
    value: Any,
    *,
    integer: bool = False,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
) -> None:
    """Raise unless ``value`` is a finite number in [low, high] ((low, high] with ``open_low``)."""
    check_type(name, value, int if integer else (int, float), "an integer" if integer else "a number")
    above = low is None or (value > low if open_low else value >= low)
    below = high is None or value <= high
    if not (above and below) or value in (math.inf, -math.inf):  # NaN fails here too
        parts = [] if low is None else [f"{'>' if open_low else '>='} {low}"]
        parts += [] if high is None else [f"<= {high}"]
        reject(name, value, f"{'an integer' if integer else 'a number'} {' and '.join(parts)}".rstrip())


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in (allowed := tuple(choices)):
        reject(name, repr(value), "one of " + ", ".join(map(repr, allowed)))
