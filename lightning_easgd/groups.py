"""Which workers form a group: as the user says it, and as ranks once the workers are known.

Members of a group average their gradients, or are tied to a center of the group's own; see Groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_easgd.schedules import Period, Schedule, Strength, is_number

Members = int | Literal["node"] | Sequence[Sequence[int]]

_ALLOWED = (
    "Allowed: a number of workers that each group has, 'node' for the workers of each machine, or"
    " lists of ranks with every rank once, for example [[0, 1], [2, 3]]."
)


@dataclass(frozen=True)
class Groups:
    """Groups with centers of their own: the lower level of a two-level tree.

    Every ``tau`` steps a worker x and the center g of its group pull at each other, as worker and
    center do under EASGD; every τ steps of the strategy the groups' centers and the center c do.
    That is Tree EASGD (S. Zhang, "Distributed stochastic optimization for deep learning", thesis,
    NYU 2016) in synchronous form.

    Args:
        members: a number of workers that each group has, "node", or lists of ranks.
        tau: period inside a group, in optimizer steps; that of the strategy is a multiple.
        beta: β inside, in (0, 2), for as many workers as the group has.
        alpha: α inside, in [0, 2/(members + 1)).
        rho: ρ inside; α is ηρ. At most one of beta, alpha and rho is given; none: β = 0.9.

    Raises:
        ValueError: one is out of range.
    """

    members: Members
    tau: int = 1
    beta: float | None = None
    alpha: float | None = None
    rho: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before the workers are known."""
        if require_groups(self.members) is None:
            raise ValueError(
                f"Groups({self.members!r}) does not name groups of workers. {_ALLOWED}"
            )
        for name in ("tau", "beta", "alpha", "rho"):
            value = getattr(self, name)
            if (
                callable(value)
                or isinstance(value, Schedule)
                or (name == "tau" and value == "auto")
            ):
                raise ValueError(
                    f"Groups({name}={value!r}) is not possible: inside groups that have centers of"
                    f" their own {name} cannot change while training goes on. Give it a number."
                )
        _ = self.period, self.strength

    @property
    def period(self) -> Period:
        """τ inside."""
        return Period(self.tau)

    @property
    def strength(self) -> Strength:
        """β, α or ρ inside."""
        return Strength.choose(beta=self.beta, alpha=self.alpha, rho=self.rho)


def require_groups(groups: object) -> Members | None:
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


def arrange(groups: Members | None, nodes: Sequence[int]) -> list[list[int]]:
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
