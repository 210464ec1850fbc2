"""What tests look at inside a strategy: its collectives, and the centers of its groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lightning_easgd import EASGDStrategy

COLLECTIVES = [
    name
    for name in dir(dist)
    if callable(getattr(dist, name))
    and name.startswith(
        ("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "monitored")
    )
    and not isinstance(getattr(dist, name), type)
]


@contextmanager
def recorded_collectives(calls: list[str]) -> Iterator[None]:
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def record(name: str) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return wrapper

    for name in COLLECTIVES:
        setattr(dist, name, record(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def middles(strategy: EASGDStrategy) -> list[Any]:
    """The centers of a worker's groups, from the outermost inward."""
    found, center = [], strategy._fit.center.group
    while center is not None:
        values = center.values()["center"].items()
        found.append({name: value.numpy().copy() for name, value in values})
        center = center.group
    return found
