"""Rules under which one worker leads.

Letters: x^i a worker, L the worker that leads, c the center.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule
from lightning_easgd.algorithms.leadership import Leadership
from lightning_easgd.schedules import Schedule, Tau
from lightning_easgd.schedules.checks import is_number
from lightning_easgd.schedules.companion import Companion, WorkerView


class LeaderSGD(Rule):
    """Leader SGD: all workers are pulled to the one with the lowest running training loss.

        c <- x^L ;   x^i <- x^i - λ (x^i - c)

    So the center, which is evaluated and delivered, has the leader's weights as last sent. The
    leader is the worker that had the lowest loss at the exchange before. If several had it, the
    leader so far stays. Worker 0 leads at first, and at the end of ``fit`` the latest losses count.
    A loss is what training_step returns, also under manual optimization. Workers that do not lead
    add zeros to the sum, so an exchange costs as much as under other rules.

    Teng et al. 2019, "Leader stochastic gradient descent for distributed training of deep learning
    models", arXiv:1905.10395, with one leader for all; synchronous as the authors' code.

    Args:
        pull: λ, in (0, 1]; the authors' code takes 0.5 and τ = 256.
        loss_smoothing: s in the running loss l <- s l + (1 - s) loss, in [0, 1); 0.9 is about the
            mean of the last 10 batches, which the authors' code takes.

    Raises:
        ValueError: one is out of range; or, where the strategy is made, the model is cut into
            fragments or differences are compressed.
    """

    average = False

    def __init__(self, pull: float = 0.5, *, loss_smoothing: float = 0.9) -> None:
        if not (is_number(pull) and 0 < pull <= 1):
            raise ValueError(
                f"pull={pull!r} does not take a worker to the leader. Allowed: a number in (0, 1]."
            )
        if not (is_number(loss_smoothing) and 0 <= loss_smoothing < 1):
            raise ValueError(
                f"loss_smoothing={loss_smoothing!r} makes no running mean. Allowed: a number in"
                " [0, 1); 0 is the loss of the last batch."
            )
        self.pull = float(pull)
        self.loss_smoothing = float(loss_smoothing)
        self.mixing_rate = 1 - self.pull

    @override
    def companions(self, worker: WorkerView) -> list[Companion]:
        return [Leadership(self.loss_smoothing, worker)]

    @override
    def objection(self, *, tau: Tau, fragments: int, compression: object) -> str | None:
        if isinstance(tau, Schedule) and tau.reads_variance:
            return (
                f"tau={tau!r} is not possible with {self}: the sum of an exchange is the leader's"
                " weights, and tells no variance across workers. Allowed: another schedule, or a"
                " number."
            )
        for name, given, usual in (("fragments", fragments, 1), ("compression", compression, None)):
            if given != usual:
                return (
                    f"{name}={given!r} is not possible with {self}: the center has to be the"
                    " weights of one worker, and would become a mixture of those that led in turn."
                    f" Allowed: {name}={usual}."
                )
        return None

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        center.add_(total)
