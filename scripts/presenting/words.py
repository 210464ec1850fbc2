"""Durations, bytes and rates with units that suit them."""

from __future__ import annotations

import math


def three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def duration(seconds: float, spread: float | None = None) -> str:
    """In seconds, minutes or hours; with ± what it may be off by, in the same unit."""
    factor, unit = (3600, "h") if seconds >= 5400 else (60, "min") if seconds >= 90 else (1, "s")
    return f"{_with(seconds / factor, spread and spread / factor)} {unit}"


def amount(size: float, spread: float | None = None) -> str:
    """A number of bytes; with ± what it may be off by, in the same unit."""
    value, unit = scaled(size)
    return f"{_with(value, spread and spread * value / size)} {unit}"


def _with(value: float, spread: float | None) -> str:
    digits = max(0, 1 - math.floor(math.log10(value))) if 0 < value < 10 else int(value < 100)
    text = f"{value:,.{digits}f}"
    # One that would be shown as 0 says nothing.
    shown = f"{spread or 0.0:,.{digits}f}"
    return f"{text} ± {shown}" if float(shown.replace(",", "")) else text


def scaled(size: float) -> tuple[float, str]:
    """A number of bytes in the unit that suits it."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= factor:
            return size / factor, unit
    return size / 1e3, "kB"


def bits(rate: float) -> str:
    """Bits per second."""
    if rate >= 1e9:
        return f"{three(rate / 1e9)} Gbit/s"
    return f"{three(rate / 1e6)} Mbit/s"


def counted(number: int, noun: str) -> str:
    """With the plural, where it is one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
