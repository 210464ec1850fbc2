"""The communication period τ."""

from __future__ import annotations

import math

from lightning_easgd.schedules.base import ScalarOrSchedule, Schedule
from lightning_easgd.schedules.checks import is_count, is_number
from lightning_easgd.schedules.often import fewer_or_smaller, multiple_of
from lightning_easgd.schedules.plain import Constant, as_schedule


class Period:
    """The communication period τ: optimizer steps of a worker between two exchanges of a parameter.

    With several fragments there is an exchange every τ / fragments steps. Where some parameters are
    exchanged more often, that pause is a multiple of their period.

    Args:
        tau: a whole number, a callable that returns one, or a schedule, whose values are rounded to
            a multiple of ``fragments`` and ``often``.
        fragments: parts of the model that are exchanged in turn.
        often: period of parameters that are exchanged more often; 1: there are none.

    Raises:
        ValueError: τ is not a whole number of at least 1, or no multiple of ``fragments`` and
            ``often``; of a callable, when it returns such a τ. Or a schedule may leave the range.
    """

    def __init__(self, tau: ScalarOrSchedule, fragments: int = 1, *, often: int = 1) -> None:
        self.fragments = fragments
        self.often = often
        self._rounds = isinstance(tau, Schedule)
        check = self._require_bound if self._rounds else self._require_whole
        self.schedule = as_schedule("tau", tau, check)
        if self._rounds and self.schedule.bounds[1] < fragments * often:
            raise ValueError(
                f"tau={tau} never reaches {multiple_of(fragments, often)}: {self._why}. Let tau"
                f" become larger, or take {fewer_or_smaller(fragments, often)}."
            )

    def __str__(self) -> str:
        return str(self.schedule)

    @property
    def is_constant(self) -> bool:
        """Whether τ is a number."""
        return isinstance(self.schedule, Constant)

    def after(self, step: int) -> tuple[int, int]:
        """τ in force after ``step`` steps, and the next step that begins with an exchange.

        A constant τ exchanges at its multiples (τ | t); another one τ(step) steps after ``step``.
        With fragments, what is said of τ holds for τ / fragments. All exchanges are at multiples of
        ``often``.
        """
        value = self.schedule.at(step)
        pause = max(1, round(value / (self.fragments * self.often))) * self.often
        grid = pause if self.is_constant else self.often
        return pause * self.fragments, step // grid * grid + pause

    @property
    def _why(self) -> str:
        what = "tau steps the other parameters are"
        if self.fragments > 1 or self.often == 1:
            what = "tau / fragments steps a fragment is"
        together = ", together with what is exchanged every often.tau" if self.often > 1 else ""
        return f"every {what} exchanged{together}"

    def _require_whole(self, tau: object) -> int:
        if is_count(tau):
            if tau % (parts := self.fragments * self.often):
                raise ValueError(
                    f"tau={tau!r} is not a multiple of {multiple_of(self.fragments, self.often)}:"
                    f" {self._why}. Allowed: a multiple, for example"
                    f" tau={math.ceil(tau / parts) * parts}; or take"
                    f" {fewer_or_smaller(self.fragments, self.often)}."
                )
            return int(tau)
        raise ValueError(
            f"tau={tau!r} is not a communication period. Allowed: a whole number of optimizer"
            " steps, at least 1 (the paper uses 1 to 64), a callable of the optimizer step that"
            " returns one, a schedule, or 'auto'."
        )

    @staticmethod
    def _require_bound(tau: object) -> float:
        if is_number(tau) and tau >= 1:
            return tau
        raise ValueError(
            f"A schedule gives tau={tau!r} at one end. Allowed: 1 optimizer step or more."
        )
