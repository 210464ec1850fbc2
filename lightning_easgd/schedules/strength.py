"""How strongly a worker and the center pull at each other."""

from __future__ import annotations

from typing import Literal

from lightning_easgd.schedules.base import ScalarOrSchedule
from lightning_easgd.schedules.checks import is_number
from lightning_easgd.schedules.plain import as_schedule

Kind = Literal["beta", "alpha", "rho"]

DEFAULT_BETA = 0.9
"""β of every EASGD and EAMSGD run in the paper (section 5.1)."""


class Strength:
    """One of β, α, ρ, from which the others follow.

    β = pα (elastic symmetry) and α = ηρ, with p workers and learning rate η.

    Args:
        kind: which one.
        value: a number, a callable of the optimizer step, or a schedule.

    Raises:
        ValueError: the value is out of range.
    """

    def __init__(self, kind: Kind, value: ScalarOrSchedule) -> None:
        self.kind = kind
        self.schedule = as_schedule(kind, value, self._require)

    @classmethod
    def choose(
        cls,
        *,
        beta: ScalarOrSchedule | None,
        alpha: ScalarOrSchedule | None,
        rho: ScalarOrSchedule | None,
    ) -> Strength:
        """The one that is given; β = 0.9 if none is.

        Raises:
            ValueError: more than one is given, or a value is out of range.
        """
        kinds: dict[Kind, ScalarOrSchedule | None] = {"beta": beta, "alpha": alpha, "rho": rho}
        given = {kind: value for kind, value in kinds.items() if value is not None}
        if len(given) > 1:
            text = ", ".join(f"{kind}={value!r}" for kind, value in given.items())
            raise ValueError(
                f"Got {text}: at most one of beta, alpha and rho sets the elastic strength, the"
                " others follow from beta = workers * alpha and alpha = learning_rate * rho. Leave"
                " the others at None."
            )
        kind, value = next(iter(given.items()), ("beta", DEFAULT_BETA))
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}={self.schedule}"

    def at(self, step: int) -> float:
        """The value of β, α or ρ (whichever is set) after ``step`` optimizer steps."""
        return self.schedule.at(step)

    def alpha(self, value: float, lr: float, workers: int) -> float:
        """The moving rate α for a ``value`` of :meth:`at`, with ``lr`` the learning rate η."""
        if self.kind == "rho":
            return value * lr
        return value / workers if self.kind == "beta" else value

    def _require(self, value: object) -> float:
        if is_number(value) and value >= 0 and (self.kind != "beta" or 0 < value < 2):
            return float(value)
        allowed = {
            "beta": "a number in (0, 2), typically 0.9",
            "alpha": "a number of at least 0 and below 2/(workers + 1)",
            "rho": "a number of at least 0, with learning_rate * rho below 2/(workers + 1)",
        }[self.kind]
        raise ValueError(
            f"{self.kind}={value!r} is not allowed. Allowed: {allowed}, or a callable of the"
            " optimizer step or a schedule that gives one."
        )
