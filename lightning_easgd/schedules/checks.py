"""What a single argument may be: numbers, choices, durations."""

from __future__ import annotations

import math
from datetime import timedelta
from numbers import Real
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite real number (Python's, NumPy's), and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object, least: int = 1) -> TypeGuard[float]:
    """Whether ``value`` is a whole number of at least ``least``, perhaps given as a float."""
    return is_number(value) and value >= least and value == int(value)


def require(name: str, value: object, allowed: str, met: bool) -> None:
    """Refuse a value that is not as it has to be.

    Args:
        name: of the argument.
        value: of the argument.
        allowed: what it may be, in words.
        met: whether it is.

    Raises:
        ValueError: it is not.
    """
    if not met:
        raise ValueError(f"{name}={value!r} is not allowed. Allowed: {allowed}.")


def require_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Check that ``value`` is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    require(name, value, ", ".join(map(repr, allowed)), value in allowed)


def require_bools(**values: object) -> None:
    """Check that all arguments are True or False.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        require(name, value, "True, False", isinstance(value, bool))


def require_count(name: str, value: object, unit: str, *, least: int = 1, meaning: str = "") -> int:
    """A whole number of at least ``least``, in ``unit``; given as a float too.

    Args:
        name: of the argument.
        value: of the argument.
        unit: what it counts.
        least: the smallest that is allowed.
        meaning: what that one means, for the message.

    Raises:
        ValueError: it is not.
    """
    if is_count(value, least):
        return int(value)
    meaning = f"; {least} {meaning}" if meaning else ""
    raise ValueError(
        f"{name}={value!r} is not allowed. Allowed: a whole number of {unit}, at least"
        f" {least}{meaning}."
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
