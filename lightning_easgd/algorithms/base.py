"""What an update rule is: how the center moves by an exchange, and what becomes of the workers.

All rules share one exchange. A worker x brings a multiple of x - c, its difference from the center
c. The sum over all p workers arrives, and moves the center. A rule says three things: what a worker
sends, what it is drawn to and how far, and how the center moves. Workers are drawn in one of two
ways::

    pulled   x <- x - α (x - c)   by what each sent itself, so that nobody waits for the sum
    reset    x <- c+              to the new center, for which they wait

with α per parameter from the strategy's beta, alpha or rho. A rule may pull by anything else that a
worker knows by itself, and no worker waits then either. With ``mixing_rate`` κ a reset goes only
part of the way: x <- κ x + (1 - κ) c+. A worker's optimizer state stays its own in any case.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_easgd.schedules import Schedule, Tau
from lightning_easgd.schedules.checks import is_number
from lightning_easgd.schedules.companion import Companion, WorkerView


class Rule(ABC):
    """How an exchange moves the center and the workers. Holds options only, and no state.

    An option may be a Schedule; :meth:`move_` finds its value at the step of the exchange instead.

    Attributes:
        resets_to_center: whether workers go on from the new center; else they are pulled.
        from_own_start: whether differences count from where a worker stood after its latest
            exchange, s, instead of from the center.
        average: whether the center moves by the mean of the differences over the workers; else by
            their sum. Under an elastic rule each is weighted with α before.
        default_tau: τ where none is given, in optimizer steps.
        center_momentum: μ, in [0, 1), with which the center moves on where workers are pulled.
        mixing_rate: κ, what a worker keeps of its own weights at a reset, in [0, 1).
        delay: steps that a worker takes before its reset, while the sum travels; at most those up
            to the next exchange.
        warm_up: optimizer steps at the beginning of training in which the workers average their
            gradients, and so stay equal.
    """

    resets_to_center: ClassVar[bool] = True
    from_own_start: ClassVar[bool] = False
    default_tau: ClassVar[int] = 10
    average: bool = True
    center_momentum: float = 0.0
    mixing_rate: float = 0.0
    delay: int = 0
    warm_up: int = 0

    @property
    def elastic(self) -> bool:
        """Whether the strategy's beta, alpha or rho sets what workers send; else share does."""
        return not self.resets_to_center

    @property
    def moving_rate(self) -> float | None:
        """How far an exchange draws a worker; None if by just what it sends, α (x - c)."""
        return 1 - self.mixing_rate if self.resets_to_center else None

    @property
    def beta_bound(self) -> float | None:
        """β at and above which the rule diverges; None if α = 2/(p+1) says it."""
        return None

    @abstractmethod
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        """Move the center, in place. A pure function; equal arguments give equal bits everywhere.

        Args:
            center: a flat part of the center c, of shape (n,), in single or double precision.
            total: mean or sum of the differences, of the same shape; may be overwritten.
            state: what the rule keeps of this part from one exchange to the next, empty at first;
                tensors and numbers, which checkpoints hold.
        """

    def pull_(
        self, moved: Tensor, *, center: Tensor, start: Tensor, state: Mapping[str, Any]
    ) -> None:
        """Turn the difference of a worker into what it loses by the exchange, in place.

        Asked where workers are pulled and the rule has a moving rate. A pure function, as
        :meth:`move_`; the exchange that begins has not moved the center yet.

        Args:
            moved: the difference of a flat part.
            center: that part of the center, to read.
            start: from what the difference counts, to read: the center, or s.
            state: as of :meth:`move_`, to read.
        """
        raise NotImplementedError

    def companions(self, worker: WorkerView) -> list[Companion]:
        """What the rule needs of the workers besides its maths; see Companion.

        Called where training is set up, and sooner to know the names of their fields, which must
        not depend on the worker.

        Args:
            worker: what they may know of the worker that they are for.
        """
        return []

    def share(self, workers: int) -> float:
        """The multiple of x - c that each of ``workers`` workers adds, if it is not elastic."""
        return 1 / workers if self.average else 1.0

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The options that follow a schedule, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Schedule)}

    def at(self, step: int) -> Rule:
        """This rule with the values that its schedules have after ``step`` optimizer steps."""
        schedules = self.schedules
        if not schedules:
            return self
        rule = copy.copy(self)
        vars(rule).update({name: schedule.at(step) for name, schedule in schedules.items()})
        return rule

    @property
    def overlaps(self) -> bool:
        """Whether workers can go on while the sum travels, with the same result."""
        return not self.resets_to_center or self.delay > 0

    def objection(self, *, tau: Tau, fragments: int, compression: object) -> str | None:
        """Why the rule is not itself under these options of the strategy, and what is allowed.

        Args:
            tau: τ as the strategy got it, valid by itself.
            fragments: into how many parts the model is cut.
            compression: as the strategy got it, valid by itself.

        Returns:
            The message of an error; None if the rule can.
        """
        if self.from_own_start and isinstance(tau, Schedule) and tau.reads_variance:
            return (
                f"tau={tau!r} is not possible with {self}: the sum of an exchange is what workers"
                " did, and tells no variance across workers. Allowed: another schedule, or a"
                " number."
            )
        return None

    @property
    def kind(self) -> str:
        """Equal for rules that understand each other's state."""
        return type(self).__name__

    def __repr__(self) -> str:
        """Name and options, by which workers are compared."""
        options = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({options})"


def require_momentum(name: str, momentum: object) -> float:
    """A momentum, in [0, 1).

    Raises:
        ValueError: it is not; the center would move ever faster.
    """
    if is_number(momentum) and 0 <= momentum < 1:
        return float(momentum)
    raise ValueError(
        f"{name}={momentum!r} is not stable: each move of the center would be at least as large as"
        " the one before. Allowed: a number in [0, 1); 0 is without momentum."
    )


def momentum_of(state: dict[str, Any], center: Tensor) -> Tensor:
    """The momentum that is kept of a part of the center; zero at first."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(center)
    momentum: Tensor = state["momentum"]
    return momentum
