"""WHEN workers exchange and how strongly: τ and one of β, α, ρ, as numbers or callables.

A callable gets the number of optimizer steps taken so far and must return the same value on every
worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeGuard

Rate = float | Callable[[int], float]

DEFAULT_BETA = 0.9
"""β of every EASGD and EAMSGD run in the paper (section 5.1)."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite real number (Python's, NumPy's), and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Period:
    """The communication period τ: optimizer steps of a worker between two exchanges of a parameter.

    With several fragments there is an exchange every τ / fragments steps.

    Raises:
        ValueError: τ is not a whole number of at least 1 or not a multiple of the fragments (at
            construction, or when a callable returns it).
    """

    tau: int | Callable[[int], int]
    fragments: int = 1

    def __post_init__(self) -> None:
        if not callable(self.tau):
            self._check(self.tau)

    def __str__(self) -> str:
        return "callable" if callable(self.tau) else str(self.tau)

    @property
    def is_constant(self) -> bool:
        """Whether τ is a number."""
        return not callable(self.tau)

    def after(self, step: int) -> tuple[int, int]:
        """τ in force after ``step`` steps, and the next step that begins with an exchange.

        A constant τ exchanges at its multiples (τ | t); a callable one τ(step) steps after
        ``step``. With fragments, what is said of τ holds for τ / fragments.
        """
        if callable(self.tau):
            tau = self._check(self.tau(step))
            return tau, step + tau // self.fragments
        tau = int(self.tau)
        pause = tau // self.fragments
        return tau, (step // pause + 1) * pause

    def observe(self, workers: Sequence[Any]) -> bool:
        """As of AutomaticPeriod: nothing is learned from what workers measured."""
        return False

    def state(self) -> dict[str, Any]:
        """As of AutomaticPeriod: nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As of AutomaticPeriod: nothing."""

    def _check(self, tau: object) -> int:
        if is_number(tau) and tau >= 1 and tau == int(tau):
            if tau % self.fragments:
                raise ValueError(
                    f"tau={tau!r} is not a multiple of fragments={self.fragments}: every"
                    " tau / fragments steps a fragment is exchanged. Allowed: a multiple, for"
                    f" example tau={math.ceil(tau / self.fragments) * self.fragments}."
                )
            return int(tau)
        raise ValueError(
            f"tau={tau!r} is not a communication period. Allowed: a whole number of optimizer"
            " steps, at least 1 (the paper uses 1 to 64), a callable of the optimizer step that"
            " returns one, or 'auto'."
        )


@dataclass(frozen=True)
class Strength:
    """How strongly a worker and the center pull at each other: one of β, α, ρ; the others follow.

    β = pα (elastic symmetry) and α = ηρ, with p workers and learning rate η.
    """

    kind: Literal["beta", "alpha", "rho"]
    value: Rate

    @classmethod
    def choose(cls, *, beta: Rate | None, alpha: Rate | None, rho: Rate | None) -> Strength:
        """The one that is given; β = 0.9 if none is.

        Raises:
            ValueError: more than one is given, or a value is out of range.
        """
        given: dict[Literal["beta", "alpha", "rho"], Rate] = {}
        if beta is not None:
            given["beta"] = beta
        if alpha is not None:
            given["alpha"] = alpha
        if rho is not None:
            given["rho"] = rho
        if len(given) > 1:
            text = ", ".join(f"{kind}={value!r}" for kind, value in given.items())
            raise ValueError(
                f"Got {text}: at most one of beta, alpha and rho sets the elastic strength, the"
                " others follow from beta = workers * alpha and alpha = learning_rate * rho. Leave"
                " the others at None."
            )
        kind, value = next(iter(given.items()), ("beta", DEFAULT_BETA))
        return cls(kind, value)

    def __post_init__(self) -> None:
        if not callable(self.value):
            self._check(self.value)

    def at(self, step: int) -> float:
        """The value of β, α or ρ (whichever is set) after ``step`` optimizer steps."""
        return self._check(self.value(step)) if callable(self.value) else float(self.value)

    def alpha(self, value: float, lr: float, workers: int) -> float:
        """The moving rate α for a ``value`` of :meth:`at`, with ``lr`` the learning rate η."""
        if self.kind == "rho":
            return value * lr
        return value / workers if self.kind == "beta" else value

    def _check(self, value: object) -> float:
        if is_number(value) and value >= 0 and (self.kind != "beta" or 0 < value < 2):
            return float(value)
        allowed = {
            "beta": "a number in (0, 2), typically 0.9",
            "alpha": "a number of at least 0 and below 2/(workers + 1)",
            "rho": "a number of at least 0, with learning_rate * rho below 2/(workers + 1)",
        }[self.kind]
        raise ValueError(
            f"{self.kind}={value!r} is not allowed. Allowed: {allowed}, or a callable of the"
            " optimizer step that returns one."
        )
