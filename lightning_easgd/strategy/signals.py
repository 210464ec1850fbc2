"""Signals without collectives: they reach all workers in the headers of the exchanges.

[Note: signals] Lightning's training epoch loop broadcasts a SIGTERM flag from rank 0 before every
batch (since 2.5.2), which makes every worker wait for rank 0 at every step. Its handlers run
collectives that no other rank has been told of, so a signal to one rank hangs: SIGTERM's
broadcasts, SLURM's saves a checkpoint, a Timer's limit is broadcast after every batch. Under EASGD
all of them ask for a stop in the header of the next exchange, and so does Ctrl-C, which reaches
every worker in another step; all workers then stop at the same step. Lightning's handlers are
replaced on the trainer's own objects before they are registered, so that no signal finds them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_easgd.communication import Stop
from lightning_easgd.strategy.lightning_internals import LoopHooks


class SignalRelay:
    """Passes what ends training on one worker on to all, until :meth:`restore`.

    Args:
        trainer: of this worker.
        hooks: of the trainer.
        request_stop: passes a request on to all workers; False if no training is under way, in
            which case the signal is handled as for a single process.
    """

    def __init__(
        self, trainer: pl.Trainer, hooks: LoopHooks, request_stop: Callable[[Stop], bool]
    ) -> None:
        self._trainer = trainer
        self.hooks = hooks
        """Of the trainer."""
        self._request_stop = request_stop
        self._interrupted = False
        hooks.on_sigterm(self._terminate)
        self._save_and_requeue = hooks.on_preemption(self._preempt)
        self._on_interrupt = signal.getsignal(signal.SIGINT)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if trainer.world_size > 1 and in_main_thread and self._on_interrupt is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)

    def restore(self) -> None:
        """Put Ctrl-C's handler back, and what the hooks replaced."""
        # Not if Lightning ignores it by now, while it shuts down.
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, self._on_interrupt)
        self.hooks.restore()

    def stop(self, why: Stop, askers: Sequence[int] = ()) -> None:
        """End training between batches, if there is a reason; all workers call it together.

        Args:
            why: the reason.
            askers: ranks of the workers that were asked to stop.

        Raises:
            KeyboardInterrupt: for Ctrl-C, as Lightning does.
            SIGTERMException: for the other signals, likewise.
        """
        if why.in_time:
            self._end_in_time(why, askers)
        elif why is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        elif why.by_exception:
            if why is Stop.PREEMPTED:
                self._save_and_requeue()
            self.hooks.mark_terminated()
            raise SIGTERMException

    def time_is_over(self) -> None:
        """Ask all workers to stop because a time limit is reached."""
        self._request_stop(Stop.TIME)

    def _end_in_time(self, why: Stop, askers: Sequence[int]) -> None:
        news = not self._trainer.should_stop and self._trainer.global_rank not in askers
        self._trainer.should_stop = True
        if news and (why is Stop.ENOUGH or self.hooks.tells_time):
            reason = "set trainer.should_stop" if why is Stop.ENOUGH else "reached a time limit"
            who = ", ".join(map(str, askers))
            rank_zero_info(f"Worker(s) {who} {reason}: all end their training together.")

    def _terminate(self, signum: int, _: FrameType | None) -> None:
        if self._request_stop(Stop.TERMINATED):
            return
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self.hooks.terminated:
            launcher.kill(signum)
        self.hooks.mark_terminated()

    def _preempt(self, signum: int, frame: FrameType | None) -> None:
        if not self._request_stop(Stop.PREEMPTED):
            self._save_and_requeue()

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
