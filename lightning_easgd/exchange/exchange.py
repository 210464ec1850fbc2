"""One exchange after another: due? -> start -> wait -> apply -> record.

[Note: order of a step] The paper's order (arXiv:1412.6651, Alg. 1 and 2): at optimizer step t with
τ | t the elastic difference d = α (x - c) is taken from the weights before the step, the local
optimizer steps, and only then the worker is pulled: x <- x - d. The pull never enters gradients,
momentum, weight decay or clipping. At t = 0 the difference is zero and no exchange is made.

[Note: restarts] Under a rule whose workers restart at the center, the exchange follows the step
that makes τ | t, and is awaited there. Before the next step it would be too late: where gradients
are accumulated, and under manual optimization, they would belong to weights that are gone. So the
center is always as new as the latest exchange, and a last one is made only of what has been trained
since.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_easgd.center.center import SwappedIn
from lightning_easgd.center.swap import Swap
from lightning_easgd.communication import Phase, Stop
from lightning_easgd.exchange.difference import Pull, pull_worker
from lightning_easgd.exchange.ending import BeforeTheEnd
from lightning_easgd.exchange.outside_writes import OutsideWrites
from lightning_easgd.exchange.parts import Parts


class Exchange:
    """The elastic link between one worker and the center it shares with the others.

    Args:
        parts: of which it is made.
    """

    def __init__(self, parts: Parts) -> None:
        self.center = parts.center
        self.swap = Swap(parts.center)
        self.telemetry = parts.telemetry
        self.writes = OutsideWrites(parts.center, parts.optimizers.current)
        self._parts = parts
        self._clock = parts.clock
        self._levels = parts.levels
        self._link = parts.levels.top
        self._gradients = parts.gradients
        self._rendezvous = parts.rendezvous
        self._resets = parts.policy.algorithm.resets_to_center
        self._averaged = self._starts = False
        self._before_the_end: BeforeTheEnd | None = None
        self._start_clock(0)

    @property
    def clock(self) -> int:
        """Optimizer steps taken; equal on all workers at every exchange."""
        return self._clock.steps

    @property
    def begun(self) -> bool:
        """Whether training has; before that, the module is the center, whatever it holds."""
        return self._clock.begun

    def was_written(self) -> bool:
        """Whether user code wrote to weights since the workers were made equal, before training."""
        return not self.begun and (self.writes.wrote_to_frozen() or self.swap.differs())

    def module_changed(self) -> bool:
        """Whether user code replaced, added or tied parts of the module before training."""
        structure = self.center.structure
        return structure is not None and not structure.is_of(self.center.module)

    def follow_module(self) -> None:
        """Take part with the parameters and buffers that the module has now, before training."""
        self.center.rebuild()
        if self._gradients is not None:
            self._gradients.follow(self.center.module.parameters())

    def start_clock(self, step: int) -> None:
        """Begin to train after ``step`` optimizer steps, equal on all workers."""
        self._start_clock(step)
        self._begin()

    def _begin(self, *, goes_on: bool = False) -> None:
        if not self.begun:
            self._clock.begun = self._starts = True
            self.center.read_module()
        self._starts &= self._link.begin(goes_on=goes_on)
        self.center.structure = None  # which keeps what was replaced later
        self.writes.begin()

    def before_batch(self) -> None:
        """A training step begins; training starts from what hooks wrote before the first one."""
        if self._starts:  # nobody is asked; if weights differ, the first exchange tells by checksum
            self._starts = False
            self.center.read_module(statistics=False)
        self.writes.before_batch(self.clock)

    def _start_clock(self, step: int) -> None:
        self._reopen()
        self._link.start_training()
        if self._gradients is not None:
            self._gradients.start()
        self._clock.set(step)
        self._levels.set_clock(step)

    def resume(self, *, goes_on: bool) -> None:
        """Begin to train with the state of :meth:`load_state`, when the optimizers have theirs.

        Args:
            goes_on: whether this worker's own state was there.

        Raises:
            ExchangeError: another worker left or did not come in time.
        """
        if self._gradients is not None:
            self._gradients.resume(self.clock, goes_on=goes_on)
        self._begin(goes_on=goes_on)  # behind it: weights of another may have been taken over

    def request_stop(self, why: Stop) -> bool:
        """Ask all workers to stop at the same step; as of Rendezvous."""
        return self._rendezvous.request_stop(why)

    @property
    def stopping(self) -> Stop:
        """Why training ends with this step."""
        return self._parts.stops.stopping

    @property
    def stop_askers(self) -> list[int]:
        """Ranks of the workers that were asked to stop, when :attr:`stopping` tells why."""
        return self._parts.stops.askers

    @property
    def trains(self) -> bool:
        """Whether the module holds the worker, which may take another step."""
        return self._before_the_end is None and not self.swap.is_swapped

    def after_training_step(self, output: object, samples: int = 1) -> bool:
        """A step of so many samples has returned ``output``; whether it has a loss if needed."""
        self._clock.samples += samples
        self.center.adopt_unfrozen()  # before the optimizer moves what the step unfroze
        return self._parts.agreement.observe(output)

    @contextmanager
    def step(self, optimizer: Optimizer) -> Iterator[None]:
        """Surround one step of one of the worker's optimizers, and begin the exchange that is due.

        The pull is applied even if the step raises, for the center gets it anyway.
        """
        assert not self.swap.is_swapped, "a step was taken while the module showed the center"
        self.writes.before_step()
        self.center.adopt_unfrozen()
        exchanges = self.telemetry.exchanges
        due = self.clock + self._resets >= self._clock.next_due
        pull = [] if self._resets else self._start_due()
        try:
            try:
                yield
            finally:
                self._averaged = False
                self._parts.optimizers.after_step(optimizer)
                self.writes.before_exchange(exchanges=due)
        finally:
            pull_worker(pull)
            self._count_step()
        if self._resets:
            self._link.go_on(self.clock)
            self._start_due()
        elif self._link.resets_workers:
            self.drain()
        if self.telemetry.exchanges > exchanges:
            self.writes.after_exchange()

    def _count_step(self) -> None:
        self._clock.steps += 1
        self._parts.progress.take_step(self.clock)
        self.telemetry.steps += 1
        self._link.timer.step(self._link.arrived)

    def average_gradients(self, *, anew: bool = False) -> None:
        """Average the gradients of this step with those of other workers, if that is wanted.

        Args:
            anew: whether a backward pass made new ones, which no optimizer step averages again.

        Raises:
            ExchangeError: one of them is missing, or stands in another step.
            ValueError: a gradient is sparse.
        """
        if self._gradients is not None and (anew or not self._averaged):
            self._gradients.average(self.clock)
            self._averaged = anew

    def drain(self) -> None:
        """Wait for the exchange in flight, if any, and move the center.

        Raises:
            ExchangeError: it failed, or the workers are out of step; the center stays as it was.
            NonFiniteError: no worker had finite weights; the center stays as it was.
        """
        if not self.swap.is_swapped:  # which looks written to when a server's center moves
            self._levels.drain()

    def meet(self, phase: Phase) -> bool:
        """Be idle where others may be, too; as of Rendezvous.

        Raises ExchangeError as :meth:`drain` does.
        """
        self.writes.forget()
        return self._rendezvous.meet(phase)

    @contextmanager
    def swapped(
        self, which: SwappedIn = "delivered", *, latest: bool = True, during: str = ""
    ) -> Iterator[None]:
        """The module holds the center in between, or what is delivered of it.

        Args:
            which: as of Swap.
            latest: whether the exchange in flight is awaited first.
            during: what for, to warn of what is undone.

        Raises as :meth:`drain` does.
        """
        if not self.begun:
            yield
            return
        if latest and not self.swap.is_swapped:  # which is compared with what it was given
            self.drain()
            self._link.refresh()
        self.writes.look_at_modes()
        with self.swap.swapped(which, in_flight=not latest, during=during):
            yield

    def before_save(self) -> None:
        """A checkpoint is made: warn of what hooks wrote that will not be in it."""
        if self.begun and not (self._starts or self.swap.is_swapped):
            self.writes.before_save()

    def after_dump(self, checkpoint: dict[str, Any]) -> Any:
        """The checkpoint that was made, without what shares memory with what is swapped."""
        if self.swap.is_swapped:
            self.writes.after_dump(checkpoint)
        return self.swap.copied(checkpoint)

    def finish(self, *, exchange: bool) -> bool:
        """End training: a last exchange if wanted, then the module holds the center everywhere.

        What is saved from then on is what training goes on from; see [Note: after the end].
        Waits for all workers. Parameters that wait to join are let in first, so that nothing of
        theirs is lost. Does nothing a second time.

        Returns:
            False if all stop before; :attr:`stopping` says why.
        """
        if self._before_the_end is not None or not self.begun:
            return True
        before = self._keep()
        if not self.meet(Phase.FIT_END):
            return False
        if self.clock != before.shared["clock"]:  # others trained on meanwhile
            before = self._keep()
        self._rendezvous.finish(exchange=exchange)
        self.swap.swap_in("delivered", aside=before.owed)
        self._before_the_end = before
        return True

    def _keep(self) -> BeforeTheEnd:
        self.drain()
        return self._parts.saved.before_the_end()

    def center_state_dict(
        self, module: nn.Module, *, latest: bool = True, delivered: bool = False
    ) -> dict[str, Any]:
        """The module's own state dict while it holds the center; a copy, so it stays as it is.

        Args:
            module: the worker's.
            latest: whether the exchange in flight is awaited first.
            delivered: whether the center's running average, if there is one, takes its place.
        """
        with self.swapped("delivered" if delivered else "center", latest=latest):
            state: dict[str, Any] = self.swap.copied(module.state_dict())
            return state

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint. Nothing may be in flight."""
        if self._before_the_end is not None:
            return self._before_the_end.shared
        if not self.begun:
            self.center.read_module()
        return self._parts.saved.shared()

    def own_state(self) -> dict[str, Any]:
        """What this worker alone knows beside its weights, for a checkpoint."""
        return self._parts.saved.own() if self._before_the_end is None else self._before_the_end.own

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; the module holds what it delivered, and then the center.

        Args:
            shared: of :meth:`shared_state`.
            own: of :meth:`own_state`; None to start at the center.
        """
        self.swap.release()
        if self.swap.differs():
            warnings.warn(
                "Hooks wrote to the weights before training resumed. That is undone: what the"
                " checkpoint holds counts. Load weights in hooks only where ckpt_path is not set.",
                stacklevel=2,
            )
            self.center.write("center")
        self._parts.saved.load(shared, own)

    def read_module(self) -> None:
        """Start again from the module's weights, which are equal on all workers."""
        self.drain()
        self.writes.forget()
        self.center.read_module()
        self._reopen()

    def _reopen(self) -> None:
        # The learning-rate finder ends a training of its own before the one that it was called in.
        self.swap.release()
        self._before_the_end = None
        self._link.forget_owed()
        self._parts.agreement.forget()
        self._rendezvous.reopen()

    def _start_due(self) -> Pull:
        """Start what is due at this step, level by level; see tree.py, [Note: levels]."""
        pull: Pull | None = None
        if self.clock >= self._clock.next_due:
            if self._gradients is not None:
                self._gradients.before_exchange(self.clock)
            self._levels.wait()
            self._parts.stops.take_effect()
            self._clock.set(self.clock)
            pull = self._link.start(self.clock)
        owed = self._levels.start_due(self.clock, pull)
        if not self._parts.policy.overlap and not self._link.resets_workers:
            self._levels.wait()
        return owed
