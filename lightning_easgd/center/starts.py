"""Where a worker stood after its latest exchange, under rules that count from there.

See Fragment.start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_easgd.center.center import Center
from lightning_easgd.center.fragments import Fragment, put_together


def stand_at_center(center: Center) -> None:
    """Keep where a worker stands that was just given the center, whatever becomes of that."""
    for fragment in _fragments(center):
        fragment.own_start()


def read_starts(center: Center) -> dict[str, Any]:
    """Copies, by the names of parameters, for a checkpoint."""
    return put_together(pair for f in _fragments(center) for pair in f.values(f.own_start()))


def has_starts(center: Center) -> bool:
    """Whether the worker stood elsewhere than at the center."""
    return any(fragment.start is not None for fragment in _fragments(center))


def load_starts(center: Center, saved: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`read_starts`; a parameter that is not there stood at the center."""
    for fragment in _fragments(center):
        for slice_, view in fragment.values(fragment.own_start()):
            if slice_.name in saved:
                view.copy_(slice_.of(saved[slice_.name]))


def _fragments(center: Center) -> Iterator[Fragment]:
    for cohort in center.cohorts:
        yield from cohort.fragments
