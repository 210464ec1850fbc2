"""Signals without collectives: what the strategy replaces in one trainer, and why.

[Note: signals] Lightning's training epoch loop broadcasts a SIGTERM flag from rank 0 before every
batch (``_TrainingEpochLoop._broadcast_sigterm_tensor``, since 2.5.2), which makes every worker wait
for rank 0 at every step. Its signal handler (``_SignalConnector._sigterm_notifier_fn``) runs a
collective that no other rank has been told of, so a signal to one rank hangs. Under EASGD the flag
travels in the header of the exchanges instead. Both are replaced on the trainer's own objects,
before Lightning registers its handlers, so that no signal finds the stock one; other trainers and
strategies keep theirs. Ctrl-C, which reaches every worker in another step, travels the same way.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_easgd.communication import Stop


class SignalRelay:
    """Passes SIGTERM and Ctrl-C to one worker on to all, until :meth:`restore`.

    Args:
        trainer: whose handlers are not registered yet.
        request_stop: passes a request on to all workers; False if no training is under way, in
            which case the signal is handled as for a single process.
    """

    def __init__(self, trainer: pl.Trainer, request_stop: Callable[[Stop], bool]) -> None:
        self._trainer = trainer
        self._request_stop = request_stop
        self._interrupted = False
        self._raise_next = False
        trainer._signal_connector._sigterm_notifier_fn = self._terminate  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._before_batch  # type: ignore[method-assign]
        self._on_interrupt = signal.getsignal(signal.SIGINT)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if trainer.world_size > 1 and in_main_thread and self._on_interrupt is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)

    def restore(self) -> None:
        """Put back what was replaced."""
        self._trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)
        self._trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)
        # Not if Lightning ignores it by now, while it shuts down.
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, self._on_interrupt)

    def stop_training(self, why: Stop) -> None:
        """Make Lightning raise the exception of the signal when this batch is done."""
        if why is Stop.TERMINATED:
            self._trainer._signal_connector.received_sigterm = True
        self._raise_next = True

    def _terminate(self, signum: int, _: FrameType | None) -> None:
        if self._request_stop(Stop.TERMINATED):
            return
        connector, launcher = self._trainer._signal_connector, self._trainer.strategy.launcher
        if launcher is not None and not connector.received_sigterm:
            launcher.kill(signum)
        connector.received_sigterm = True

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if not self._interrupted and self._request_stop(Stop.INTERRUPTED):
            self._interrupted = True
            rank_zero_info(
                "\nCtrl-C: all workers will stop together, at one of the next two exchanges. Press"
                " it again to end at once."
            )
        elif callable(self._on_interrupt):
            self._on_interrupt(signum, frame)
        else:
            raise KeyboardInterrupt

    def _before_batch(self) -> None:
        """Instead of the broadcast: between exchanges nobody waits for anybody."""
        if self._raise_next:
            raise KeyboardInterrupt


def exception_of(why: Stop) -> BaseException:
    """What Lightning raises for a signal."""
    return SIGTERMException() if why is Stop.TERMINATED else KeyboardInterrupt()
