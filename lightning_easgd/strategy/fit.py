"""One fit of one worker: what its exchanges need, from set-up to tear-down.

[Note: one object per fit] Group, center, exchange, hooks and signals are made together when
Lightning sets a fit up, and go together when it tears it down. Nothing in here is ever absent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_easgd.center.names import listed
from lightning_easgd.center.swap import leaving_eval
from lightning_easgd.checkpoint.own_values import OwnValues
from lightning_easgd.checkpoint.resumed import Resumed
from lightning_easgd.communication import Phase, Stop, make_equal_, require_equal
from lightning_easgd.schedules import TrainingLength
from lightning_easgd.strategy.build import make_exchange
from lightning_easgd.strategy.equal_workers import EqualWorkers
from lightning_easgd.strategy.lightning_internals import stops_early
from lightning_easgd.strategy.resume_epoch import begin_epoch_as_usual
from lightning_easgd.strategy.samples import samples_in
from lightning_easgd.strategy.signals import SignalRelay
from lightning_easgd.strategy.unsupported import (
    batches_per_epoch,
    expected_training,
    may_skip_batches,
    may_skip_steps,
)
from lightning_easgd.telemetry import Telemetry

_BETWEEN_BATCHES = "between two batches: loader, hooks or callbacks"


class Fit:
    """Training under way; made by all workers at set-up.

    Args:
        trainer: with the optimizers.
        workers: all of them, made equal.
        signals: of the trainer, whose hooks it takes.
        groups: as of make_exchange.
        telemetry: where costs are counted.
        validates_center: whether validation sees the center, not each worker's own weights.

    Raises:
        ValueError: as make_exchange.
        ExchangeError: as make_exchange.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        workers: EqualWorkers,
        *,
        signals: SignalRelay,
        groups: list[list[list[int]]],
        telemetry: Telemetry,
        validates_center: bool,
    ) -> None:
        self.trainer = trainer
        self.group, self.center = workers.group, workers.center
        self._signals, self._options = signals, workers.options
        self._validates_center, self._solo = validates_center, workers.server is not None
        self._uneven = self._uneven_steps = False
        self.beside = None if workers.server is None else workers.server.beside
        self._stepped_to = 0
        self.exchange = make_exchange(
            self.center,
            self.group,
            self._options,
            groups=groups,
            trainer=trainer,
            telemetry=telemetry,
            server=workers.server,
            while_waiting=self._save_beside,
        )
        hooks = signals.hooks
        hooks.before_batch(self._before_batch)
        if not self._solo or trainer.is_global_zero:
            hooks.around_validation(self._validating)
        else:
            hooks.skip_validation()
            hooks.at_batch_end(self._at_batch_end)
        hooks.before_end(self._finish)
        hooks.around_dump(self._saving, self.exchange.after_dump)

    @property
    def module(self) -> pl.LightningModule:
        """The user's."""
        return self.trainer.lightning_module

    @cached_property
    def own(self) -> OwnValues:
        """What this worker's file will hold; what moves is counted from the first call on."""
        return OwnValues(self.center, self.exchange.swap)

    @property
    def alone(self) -> bool:
        """Whether this worker handles an exception that the others may know nothing of."""
        return self.trainer.interrupted and not self.exchange.stopping.by_exception

    @property
    def delivers_average(self) -> bool:
        """Whether what is delivered is an average of the center."""
        return self._options.averaging is not None

    def center_state_dict(self, *, delivered: bool = False) -> dict[str, Any]:
        """The module's state dict with the center's weights, or what is delivered in its place."""
        latest = not self.alone
        return self.exchange.center_state_dict(self.module, latest=latest, delivered=delivered)

    def where(self) -> str:
        """Where in training this worker is, in words."""
        exchanges = self.exchange.telemetry.exchanges
        return f"at step {self.exchange.clock}, after exchange {exchanges},"

    def begin(self, resumed: Resumed | None) -> None:
        """Agree on how training begins; all workers call it before its first batch.

        Args:
            resumed: what it goes on from; None: it starts afresh.
        """
        first = self._agree(resumed)
        hooks = self._signals.hooks
        if resumed is None:
            self.exchange.start_clock(first)
        else:
            self.exchange.resume(goes_on=resumed.own is not None)
            resumed.restore_random_state()
            begin_epoch_as_usual(self.trainer, hooks)
        hooks.on_time_limit(self._signals.time_is_over)
        hooks.after_batch(self._after_batch)
        hooks.before_epoch_end(self._before_epoch_end)

    def _agree(self, resumed: Resumed | None) -> int:
        """Hear how all workers begin, and draw the conclusions that all draw.

        Returns:
            The step after which the clock starts.
        """
        trainer, exchange = self.trainer, self.exchange
        data = batches_per_epoch(trainer), may_skip_batches(trainer), may_skip_steps(trainer)
        length, written = astuple(expected_training(trainer)), exchange.was_written()
        changed = resumed is None and exchange.module_changed()
        mine = trainer.global_step, data, length, written, changed
        steps, told, expected, wrote, replaced = zip(*self.group.gather(mine), strict=True)
        if any(replaced):
            require_equal(self.group, self.module, self._options.lines())
            exchange.follow_module()
        if any(wrote) or any(replaced):
            self._begin_equal()
        lengths = [TrainingLength(*each) for each in expected]
        self._options.rules.schedules.begin(TrainingLength.of_all(lengths))
        self._expect(told)
        first: int = max(steps)
        return first

    def _expect(self, told: Sequence[tuple[int | None, bool, bool]]) -> None:
        """Learn from the data of all whether workers may take different numbers of steps."""
        batches, skip_batches, skip_steps = zip(*told, strict=True)
        self._uneven_steps = self.group.size > 1 and any(skip_steps)
        differ = len(set(batches)) > 1 or None in batches or any(skip_batches)
        self._uneven = self._uneven_steps or (self.group.size > 1 and differ)

    def _begin_equal(self) -> None:
        """User code wrote to weights before training: those of worker 0 count where they differ."""
        if differing := make_equal_(self.group, self.center.named_tensors()):
            named = listed(differing, quoted=False)
            warnings.warn(
                f"The workers do not begin with the same weights: {named} differed when training"
                " began, because hooks or the sanity check wrote to them. All workers go on from"
                " those of worker 0. Write the same on every worker: load the same file, or call"
                " seed_everything before random ones are drawn.",
                stacklevel=2,
            )

    def enter(self, place: str) -> None:
        """Let the others know where this worker is, should they come to wait for it."""
        self.group.progress.enter(place)

    def _before_batch(self) -> None:
        self.enter(_BETWEEN_BATCHES)
        # Between exchanges no worker waits for another. But those that leave, leave together.
        if self.exchange.stopping.by_exception:
            self._meet(Phase.STOP)

    @contextmanager
    def _after_batch(self) -> Iterator[None]:
        self.enter(_BETWEEN_BATCHES)
        if stops_early(self.trainer):
            # Perhaps on this worker alone. It tells the others, and waits for them from now on.
            self.exchange.request_stop(Stop.ENOUGH)
            self._uneven = True
        yield
        if self._solo and self.exchange.stopping.by_exception:  # no exchange of all says so
            self.stop()

    def _at_batch_end(self) -> None:
        """Where ModelCheckpoint saves; where gradients accumulate, only behind a step."""
        before, self._stepped_to = self._stepped_to, self.exchange.clock
        if self.exchange.clock > before:
            self._save_beside()

    def _save_beside(self) -> None:
        """Save this worker's own state, at its own pace, if worker 0 has made a checkpoint."""
        if self.beside is not None and self.trainer.global_rank > 0:
            for path, _ in self.beside.due()[:1]:  # one save answers all
                self.trainer.save_checkpoint(path)

    def _before_epoch_end(self) -> None:
        self._meet_if_uneven(Phase.EPOCH_END)
        self.exchange.writes.end_epoch(self.exchange.clock)

    def _meet_if_uneven(self, phase: Phase) -> None:
        self.enter(f"at {phase.name.lower().replace('_', ' ')}")
        if self._uneven:
            self._meet(phase)

    def _meet(self, phase: Phase) -> None:
        """Wait for workers that have more batches than this one, and shadow their exchanges."""
        self.exchange.meet(phase)
        self.stop()

    def stop(self) -> None:
        """End training if all workers agreed to; raises as SignalRelay.stop does."""
        self._signals.stop(self.exchange.stopping, self.exchange.stop_askers)

    def await_others(self, phase: Phase) -> None:
        """Wait for the others ahead of a collective of Lightning's, where they may come later."""
        # Metrics may be reduced at every batch, which is too often to meet. Where workers have
        # different numbers of batches, an error says so later.
        every_batch = phase in (Phase.REDUCTION, Phase.GATHERING)
        if self._uneven_steps or not every_batch:
            self._meet_if_training(phase)

    def _meet_if_training(self, phase: Phase) -> None:
        if self.exchange.trains and not self.trainer.interrupted:  # who left together is together
            self._meet_if_uneven(phase)

    def training_step(self, step: Callable[[], Any], batch: Any) -> Any:
        """One batch of this worker, whose loss the rule may want to know."""
        self.enter("in a training step")
        self.exchange.before_batch()
        output = step()
        known = self.exchange.after_training_step(output, samples_in(batch))
        if not known and not self.module.automatic_optimization:
            raise MisconfigurationException(
                f"{self._options.rules.algorithm} compares the workers' training losses, and under"
                " manual optimization training_step returned none. Return the loss, or"
                " {'loss': loss}."
            )
        return output

    def after_backward(self) -> None:
        """Under manual optimization gradients are averaged here: what follows may clip them."""
        if not self.module.automatic_optimization:
            self.exchange.average_gradients(anew=True)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        step: Callable[[Callable[[], Any]], Any],
    ) -> Any:
        """One step of one optimizer of this worker, with the exchange that is due at it.

        Args:
            optimizer: of this worker.
            closure: computes loss and gradients.
            step: takes the step, given a closure.
        """
        exchange = self.exchange

        def averaged() -> Any:
            exchange.writes.before_closure()
            loss = closure()
            exchange.writes.before_step()
            exchange.average_gradients()  # before they are unscaled and clipped
            return loss

        with exchange.step(optimizer):
            output = step(averaged)
        if exchange.stopping.in_time:
            self.stop()
        return output

    @contextmanager
    def _validating(self) -> Iterator[None]:
        if self.exchange.begun:
            self._meet_if_uneven(Phase.VALIDATION)
        with ExitStack() as stack:
            if self._validates_center:
                stack.enter_context(self.exchange.swapped(during="validation"))
            if not is_overridden("on_validation_model_train", self.module):
                stack.enter_context(leaving_eval(self.module))
            yield

    @contextmanager
    def _saving(self) -> Iterator[None]:
        self.enter("saving a checkpoint")
        self.exchange.before_save()
        self._meet_if_training(Phase.SAVE)
        with self.exchange.swapped(latest=not self.alone, during="a checkpoint"):
            yield

    def _finish(self) -> None:
        """Put what fit delivers into the module, before the first hook of the end."""
        self.enter("at the end of training")
        if self._solo and stops_early(self.trainer):  # perhaps by a validation after the last batch
            self.exchange.request_stop(Stop.ENOUGH)
        if not self.finish_exchanging():
            self.stop()

    def finish_exchanging(self) -> bool:
        """The last exchange; False if training was stopped before it ended."""
        return self.exchange.finish(exchange=self._options.final_exchange)

    def end(self) -> None:
        """Stop as agreed, when all hooks of the end are over."""
        if self.exchange.stopping is not Stop.PREEMPTED:  # after which nothing is left to do
            self.stop()
