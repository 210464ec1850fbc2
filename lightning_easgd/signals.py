"""SIGTERM without collectives: what the strategy replaces in one trainer, and why.

[Note: signals] Lightning's training epoch loop broadcasts a SIGTERM flag from rank 0 before every
batch (``_TrainingEpochLoop._broadcast_sigterm_tensor``, since 2.5.2), which makes every worker wait
for rank 0 at every step. Its signal handler (``_SignalConnector._sigterm_notifier_fn``) runs a
collective that no other rank has been told of, so a signal to one rank hangs. Under EASGD the flag
travels in the header of the exchanges instead. Both are replaced on the trainer's own objects,
before Lightning registers its handlers, so that no signal finds the stock one; other trainers and
strategies keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType

import lightning.pytorch as pl


def relay_sigterm(trainer: pl.Trainer, request_stop: Callable[[], bool]) -> Callable[[], None]:
    """Replace Lightning's per-batch broadcast and SIGTERM notifier for this trainer.

    Returns a function that puts them back.

    Args:
        trainer: whose handlers are not registered yet.
        request_stop: passes the request on to all workers; False if no training is under way, in
            which case the signal is handled as for a single process: forwarded to the children,
            noted, nothing awaited.
    """
    connector = trainer._signal_connector

    def notify(signum: int, _: FrameType | None) -> None:
        if request_stop():
            return
        launcher = trainer.strategy.launcher
        if launcher is not None and not connector.received_sigterm:
            launcher.kill(signum)
        connector.received_sigterm = True

    def restore() -> None:
        connector.__dict__.pop("_sigterm_notifier_fn", None)
        epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)

    epoch_loop = trainer.fit_loop.epoch_loop
    connector._sigterm_notifier_fn = notify  # type: ignore[method-assign]
    epoch_loop._broadcast_sigterm_tensor = _no_broadcast  # type: ignore[method-assign]
    return restore


def _no_broadcast() -> None:
    """Between exchanges nobody waits for anybody."""


def stop_training(trainer: pl.Trainer) -> None:
    """Make Lightning raise its SIGTERMException at the end of this batch."""
    trainer._signal_connector.received_sigterm = True
