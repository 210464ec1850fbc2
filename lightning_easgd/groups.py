"""Which workers form a group: as the user says it, and as ranks once the workers are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_easgd.schedules import is_number

Groups = int | Literal["node"] | Sequence[Sequence[int]]

_ALLOWED = (
    "Allowed: a number of workers that each group has, 'node' for the workers of each machine, or"
    " lists of ranks with every rank once, for example [[0, 1], [2, 3]]."
)


def require_groups(groups: object) -> Groups | None:
    """Check what can be checked before the workers are known.

    Raises:
        ValueError: it is no way to name groups.
    """
    if groups is None or groups == "node":
        return groups
    if is_number(groups) and groups >= 1 and groups == int(groups):
        return int(groups)
    if isinstance(groups, Sequence) and not isinstance(groups, str) and groups:
        lists = [_ranks(part) for part in groups]
        ranks = [rank for part in lists for rank in part]
        if all(lists) and len(set(ranks)) == len(ranks):
            return lists
    raise ValueError(f"groups={groups!r} does not name groups of workers. {_ALLOWED}")


def arrange(groups: Groups | None, nodes: Sequence[int]) -> list[list[int]]:
    """The ranks of each group in ascending order, the group of the lowest rank first.

    Args:
        groups: as the user gave it; None: there are none.
        nodes: the machine that each worker is on, in rank order.

    Raises:
        ValueError: the groups do not cover these workers.
    """
    workers = range(len(nodes))
    if groups is None:
        return []
    if groups == "node":
        return [[rank for rank in workers if nodes[rank] == node] for node in dict.fromkeys(nodes)]
    if isinstance(groups, int):
        if len(nodes) % groups:
            raise ValueError(
                f"groups={groups} does not divide the {len(nodes)} workers. Allowed: a divisor, or"
                " lists of ranks, which need not be equally long."
            )
        return [list(workers[at : at + groups]) for at in range(0, len(nodes), groups)]
    lists = sorted(sorted(part) for part in groups)
    if sorted(rank for part in lists for rank in part) != list(workers):
        raise ValueError(
            f"groups={groups!r} does not hold every rank from 0 to {len(nodes) - 1} once, which"
            f" {len(nodes)} worker(s) have. {_ALLOWED}"
        )
    return lists


def _ranks(part: object) -> list[int]:
    if not isinstance(part, Sequence) or isinstance(part, str):
        return []
    ranks = [int(rank) for rank in part if is_number(rank) and rank >= 0 and rank == int(rank)]
    return ranks if len(ranks) == len(part) else []
