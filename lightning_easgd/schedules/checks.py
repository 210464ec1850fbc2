"""What a single argument may be: numbers, choices, durations."""

from __future__ import annotations

import math
from datetime import timedelta
from numbers import Real
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite real number (Python's, NumPy's), and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Check that ``value`` is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r} is not allowed. Allowed: {', '.join(map(repr, allowed))}."
        )


def require_bools(**values: object) -> None:
    """Check that all arguments are True or False.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not allowed. Allowed: True, False.")


def require_count(name: str, value: object, unit: str) -> int:
    """A whole number of at least 1, in ``unit``; given as a float too.

    Raises:
        ValueError: it is not.
    """
    if is_number(value) and value >= 1 and value == int(value):
        return int(value)
    raise ValueError(
        f"{name}={value!r} is not allowed. Allowed: a whole number of {unit}, at least 1."
    )


def require_timedelta(name: str, value: object) -> timedelta:
    """A positive duration, given as a timedelta.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, timedelta) and value > timedelta(0):
        return value
    raise ValueError(f"{name}={value!r} is not allowed. Allowed: a positive datetime.timedelta.")


def require_duration(name: str, value: float | timedelta) -> timedelta:
    """A positive duration, given in seconds or as a timedelta.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, timedelta):
        if value > timedelta(0):
            return value
    elif is_number(value) and value > 0:
        return timedelta(seconds=value)
    raise ValueError(
        f"{name}={value!r} is not allowed. Allowed: a positive number of seconds, or a positive"
        " datetime.timedelta."
    )
