"""Names of parameters and buffers: how they are put together, and shown in messages."""

from __future__ import annotations

from collections.abc import Iterable


def dotted(prefix: str, key: str) -> str:
    """The name in a module of what the submodule ``prefix`` calls ``key``."""
    return f"{prefix}.{key}" if prefix else key


def listed(names: Iterable[str], most: int = 3, *, quoted: bool = True) -> str:
    """The first few names in quotation marks, or as they are, and how many more there are."""
    every = list(dict.fromkeys(names))
    shown = ", ".join(f"'{name}'" if quoted else name for name in every[:most])
    return f"{shown} and {len(every) - most} more" if len(every) > most else shown
