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

[Note: standing still] Workers may have different numbers of batches. One that has no step to take
sends a header that says so, reads those of the others, and takes part in the exchange if one of
them began one: like a worker whose gradients are zero, it is pulled and pulls. Nothing is counted
twice, since what it gives to the center it loses itself. When all stand still they go on together.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import EASGD, Rule, elastic
from lightning_easgd.center.center import Center, Shown
from lightning_easgd.center.swap import Swap
from lightning_easgd.communication import AllReduce, Phase, Stop, verify_phases
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.contribution import Contribution, Pull, RateFunction, pull_worker
from lightning_easgd.exchange.ending import BeforeTheEnd, weights_owed
from lightning_easgd.exchange.gradient_averaging import GradientAverage
from lightning_easgd.exchange.level import GroupLevel
from lightning_easgd.exchange.moving_rates import MovingRates, stable_below
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.outside_writes import Writes
from lightning_easgd.exchange.probe import sample
from lightning_easgd.exchange.transit import Transit
from lightning_easgd.exchange.tree import Levels
from lightning_easgd.schedules import Period, Schedules, Strength
from lightning_easgd.telemetry import Telemetry

ElasticPoint = Literal["iterate", "parameter"]


@dataclass(frozen=True)
class ExchangePolicy:
    """When to exchange, how strongly, from which point of the worker, and what happens then.

    Under an algorithm whose workers restart there is no strength, no overlap and no such point.
    """

    period: Period
    strength: Strength
    overlap: bool = True
    elastic_point: ElasticPoint = "iterate"
    algorithm: Rule = field(default_factory=EASGD)

    @property
    def schedules(self) -> Schedules:
        """Whatever follows training."""
        named = {f"algorithm.{name}": s for name, s in self.algorithm.schedules.items()}
        named["tau"] = self.period.schedule
        if not self.algorithm.restarts:
            named[self.strength.kind] = self.strength.schedule
        return Schedules(named)


class Exchange:
    """The elastic link between one worker and the center it shares with the others.

    Args:
        center: the center of this worker's module.
        all_reduce: how sums travel between the workers.
        optimizers: the worker's own optimizers.
        rules: period, strength and variants.
        telemetry: where costs are counted.
        gradients: averages those of this worker with others'; None: nothing does.
        levels: of groups with centers of their own, from the outermost inward, whose center takes
            part in exchanges in this worker's place; none: the worker itself does.
        groups: ranks of all groups, level by level, for checkpoints.

    Raises:
        ValueError: the strength is unstable for this number of workers.
    """

    def __init__(
        self,
        center: Center,
        all_reduce: AllReduce,
        *,
        optimizers: LocalOptimizers,
        rules: ExchangePolicy,
        telemetry: Telemetry,
        gradients: GradientAverage | None = None,
        levels: Sequence[GroupLevel] = (),
        groups: Sequence[Sequence[Sequence[int]]] = (),
    ) -> None:
        self.center = center
        self.swap = Swap(center)
        self.telemetry = telemetry
        self.stopping = Stop.NO
        """Why training ends with this step, on every worker."""
        self._optimizers = optimizers
        self._rules = rules
        self._gradients = gradients
        self._levels = Levels(levels, telemetry)
        self._groups = [[list(ranks) for ranks in level] for level in groups]
        self._averaged = False
        self._before_the_end: BeforeTheEnd | None = None
        self._last_header_left = False
        self.clock = 0
        """Optimizer steps taken; equal on all workers at every exchange."""
        self.begun = False
        """Whether training has; before that, the module is the center, whatever it holds."""
        self._restarts = rules.algorithm.restarts
        self._reports = all_reduce.group.rank == 0
        self._progress = all_reduce.group.progress
        self._agreement = Agreement(rules.algorithm, optimizers, all_reduce.participants)
        contribution = Contribution(
            center,
            optimizers,
            rule=rules.algorithm,
            weights=self._weights(all_reduce),
            telemetry=telemetry,
            reckon_=self._reckoning(all_reduce),
            quantize_=all_reduce.quantize_,
            agree=self._agree,
            from_iterate=rules.elastic_point == "iterate" and not levels,
        )
        self._transit = Transit(
            center,
            all_reduce,
            contribution,
            rule=rules.algorithm,
            telemetry=telemetry,
            agreement=self._agreement,
            schedules=rules.schedules,
        )
        self.writes = Writes(center, optimizers.current)
        self._start_clock(0)
        self._starts = False
        self._frozen = [p for p in center.module.parameters() if not p.requires_grad]
        self._frozen_at_set_up = sample(self._frozen)

    def _weights(self, all_reduce: AllReduce) -> RateFunction:
        rule, leadership = self._rules.algorithm, self._agreement.leadership
        participant, workers = all_reduce.participant, len(all_reduce.participants)
        if rule.loss_smoothing is not None:
            return lambda step: ({}, float(leadership.leader == participant))
        if rule.restarts:
            return lambda step: ({}, rule.share(workers))
        strength, optimizers = self._rules.strength, self._optimizers
        waits = all_reduce.waits(self.center.device)
        bound = stable_below(workers, momentum=rule.center_momentum, waits=waits)
        rates = MovingRates(
            strength, optimizers, workers=workers, reports=self._reports, bound=bound
        )
        return rates.at

    def _reckoning(self, all_reduce: AllReduce) -> Callable[[Mapping[str, Tensor], bool], None]:
        momentum = self._rules.algorithm.center_momentum
        gamma = elastic.residual_weight(len(all_reduce.participants), momentum)
        return lambda differences, last: all_reduce.reckon_(differences, 1.0 if last else -gamma)

    def _agree(self, healthy: bool, checksum: Callable[[], int]) -> bool:
        """Whether this worker, or what takes part in its place, does so with finite differences."""
        return self._transit.all_reduce.agree(healthy and self._levels.healthy, checksum)

    def was_written(self) -> bool:
        """Whether user code wrote to weights since the workers were made equal, before training."""
        moved = self._frozen_at_set_up.differing(sample(self._frozen))
        return not self.begun and (bool(moved) or self.swap.differs())

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

    def _begin(self) -> None:
        if not self.begun:
            self.begun = self._starts = True
            self.center.read_module()
        self.center.structure = None  # which keeps what was replaced later
        self.writes.begin()

    def before_batch(self) -> None:
        """A training step begins: what hooks wrote before the first is where all begin.

        No worker is asked; a checksum of the center tells at the first exchange if they differ.
        """
        if self._starts:
            self._starts = False
            self.center.read_module(statistics=False)
        self.writes.before_batch(self.clock)

    def _start_clock(self, step: int) -> None:
        self._reopen()
        self._transit.turn = 0
        self._transit.exchanged = None
        if self._gradients is not None:
            self._gradients.start()
        self._set_clock(step)
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
        self._begin()  # behind it, for a worker may have taken over the weights of another

    def request_stop(self, why: Stop) -> bool:
        """Ask all workers to stop at the same step. Signal-safe.

        They do within two periods; three if this worker stands still, whose header has left.

        Returns:
            False if no header will leave that could say so.
        """
        if self._last_header_left:
            return why is Stop.PREEMPTED  # there is nothing left to be saved and gone on with
        self._transit.stop_requested = max(self._transit.stop_requested, why)
        return True

    @property
    def stopped_together(self) -> bool:
        """Whether all workers end their training with this step."""
        return self.stopping.by_exception

    @property
    def _finished(self) -> bool:
        return self._before_the_end is not None

    @property
    def stop_askers(self) -> list[int]:
        """Ranks of the workers that were asked to stop, when :attr:`stopping` tells why."""
        return self._transit.stop_askers

    @property
    def trains(self) -> bool:
        """Whether the module holds the worker, which may take another step."""
        return not (self._finished or self.swap.shows_center)

    def observe_loss(self, output: object) -> bool:
        """A training step has returned ``output``; whether that has a loss if one is needed."""
        return self._agreement.leadership.observe(output)

    @contextmanager
    def step(self, optimizer: Optimizer) -> Iterator[None]:
        """Surrounds one step of one of the worker's optimizers; begins the exchange that is due.

        What was sent is also taken: the pull is applied even if the step raises.
        """
        assert not self.swap.shows_center, "a step was taken while the module showed the center"
        self.writes.before_step()
        self.center.adopt_unfrozen()
        exchanges = self.telemetry.exchanges
        due = self.clock + self._restarts >= self._next_due
        pull = [] if self._restarts else self._begin_due()
        try:
            yield
        finally:
            self._averaged = False
            self._optimizers.after_step(optimizer)
            self.writes.before_exchange(exchanges=due)
            pull_worker(pull)
            self.clock += 1
            self._progress.take_step(self.clock)
            self.telemetry.steps += 1
            self._transit.timer.step(self._transit.arrived)
        if self._restarts:
            self._transit.go_on(self.clock)
            self._begin_due()
        elif self._transit.restarts_workers:
            self.drain()
        if self.telemetry.exchanges > exchanges:
            self.writes.after_exchange()

    def average_gradients(self, *, anew: bool = False) -> None:
        """Average the gradients of this step with those of other workers, if that is wanted.

        Args:
            anew: whether there are new ones, also if those of this step were averaged.

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
        self._land()
        self._transit.timer.interrupt()  # whoever needs the center has something to do with it

    def meet(self, phase: Phase) -> bool:
        """Stand still until all workers do, answering the exchanges of those that still train.

        The clocks are then set to the latest. A worker at the end of its fit stays until all are,
        however long they train. Who leaves because all stop, leaves from here, and so together.

        Args:
            phase: where this worker stands still; not in training.

        Returns:
            False if all stop; :attr:`stopping` says why.

        Raises:
            ExchangeError: as for :meth:`drain`.
        """
        self.writes.forget()
        while True:
            if self._gradients is not None:
                self._transit.go_on()  # before weights of others are taken over
                self._gradients.accompany()
            self._accompany_members(phase)
            self.drain()
            self.stopping = self._transit.stop_agreed
            self.center.adopt_unfrozen()
            self._transit.stand_still(self.clock, phase)
            headers = self._transit.headers()
            training = [header.clock for header in headers if header.phase is Phase.TRAINING]
            if training:
                self._set_clock(training[0])
                pull_worker(self._transit.answer(self.clock))
                if not self._rules.overlap or self._transit.restarts_workers:
                    self._transit.land()  # when workers that train do
                continue
            self.drain()
            self.clock = max(header.clock for header in headers)
            self._levels.catch_up(self.clock)
            if self.stopping.by_exception:
                return False
            verify_phases(headers)
            if phase is not Phase.FIT_END or all(h.phase is phase for h in headers):
                return True

    def _accompany_members(self, phase: Phase) -> None:
        """Answer the exchanges of members of groups that still train, until none does."""
        if self._levels:
            self.center.adopt_unfrozen()
        for clock in self._levels.accompany(self.clock, phase, self._announce, self._answer):
            self.clock = clock
            if not self._rules.overlap:
                self._land()

    def _announce(self, clock: int, phase: Phase) -> bool:
        """Say that this worker stands still, if all workers exchange at this step; whether so."""
        if clock < self._next_due:
            return False
        self._transit.land()
        self.stopping = self._transit.stop_agreed
        self._transit.stand_still(clock, phase)
        self._set_clock(clock)
        return True

    def _answer(self, clock: int) -> Pull:
        """Take part in the exchange of all workers, when all have said what they do."""
        self._transit.headers()
        return self._transit.answer(clock)

    @contextmanager
    def showing(
        self, which: Shown = "delivered", *, latest: bool = True, during: str = ""
    ) -> Iterator[None]:
        """The module holds the center in between, or what is delivered of it.

        Args:
            which: as of Swap.
            latest: whether the exchange in flight is awaited first.
            during: what for, to warn of what is undone.

        Raises:
            ExchangeError: as for :meth:`drain`.
            NonFiniteError: likewise.
        """
        if not self.begun:
            yield
            return
        if latest:
            self.drain()
        self.writes.look_at_modes()
        with self.swap.showing(which, in_flight=not latest, during=during):
            yield

    def before_save(self) -> None:
        """A checkpoint is made: warn of what hooks wrote that will not be in it."""
        if self.begun and not (self._starts or self.swap.shows_center):
            self.writes.before_save()

    def after_dump(self, checkpoint: dict[str, Any]) -> Any:
        """The checkpoint that was made, without what shares memory with what is swapped."""
        if self.swap.shows_center:
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
        if self._finished or not self.begun:
            return True
        before = self._keep()
        if not self.meet(Phase.FIT_END):
            return False
        if self.clock != before.shared["clock"]:  # others trained on meanwhile
            before = self._keep()
        self._last_header_left = True
        if exchange:
            self._levels.finish(self.clock)
        settled = self._restarts and self._transit.exchanged == (self.clock, self.center.joined)
        for turn in range(self.center.turns):
            is_new = not (settled and turn == self.center.turns - 1)
            if exchange and is_new:
                self._transit.begin(self.clock, last=True)
            else:
                self._transit.give_back(self.clock)
            self.drain()
        self.stopping = self._transit.stop_agreed
        self.swap.swap_in("delivered")
        self.swap.replace(before.owed)
        self._before_the_end = before
        return True

    def _keep(self) -> BeforeTheEnd:
        """What a last exchange would change of what a checkpoint holds."""
        self.drain()
        shared, own = self._shared_state(at_the_end=True), self._own_state()
        shared["outer"] = copy.deepcopy(shared["outer"])
        own["held_back"] = copy.deepcopy(own["held_back"])
        return BeforeTheEnd(shared, own, weights_owed(self.center, self._transit.owed))

    def center_state_dict(
        self, module: nn.Module, *, latest: bool = True, delivered: bool = False
    ) -> dict[str, Any]:
        """The module's own state dict while it holds the center; a copy, so it stays as it is.

        Args:
            module: the worker's.
            latest: whether the exchange in flight is awaited first.
            delivered: whether the center's running average, if there is one, takes its place.
        """
        with self.showing("delivered" if delivered else "center", latest=latest):
            state: dict[str, Any] = self.swap.copied(module.state_dict())
            return state

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint. Nothing may be in flight."""
        if self._before_the_end is not None:
            return self._before_the_end.shared
        if not self.begun:
            self.center.read_module()
        return self._shared_state()

    def _shared_state(self, *, at_the_end: bool = False) -> dict[str, Any]:
        assert self._transit.is_empty
        return {
            "begun": self.begun,
            "clock": self.clock,
            "tau": self.telemetry.tau,
            "next_due": self._next_due,
            "turn": self._transit.turn,
            "schedules": self._rules.schedules.state(),
            "consensus": self._transit.consensus.state(),
            "exchanged": self._transit.exchanged,
            "owed": self._transit.owed,
            "algorithm": self._rules.algorithm.kind,
            "groups": self._groups,
            "tied": bool(self._levels),
            "agreement": self._agreement.shared_state(),
            **self.center.shared_state(at_the_end=at_the_end),
        }

    def own_state(self) -> dict[str, Any]:
        """What this worker alone knows beside its weights, for a checkpoint."""
        return self._own_state() if self._before_the_end is None else self._before_the_end.own

    def _own_state(self) -> dict[str, Any]:
        return {
            "look_ahead": self._optimizers.look_ahead_state(),
            "telemetry": self.telemetry.counters(),
            "held_back": self._transit.all_reduce.state(),
            "agreement": self._agreement.own_state(),
            "levels": self._levels.state(),
        }

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
        self.center.load_shared_state(shared)
        self.begun = shared.get("begun", True)
        self.clock = shared["clock"]
        self._transit.turn = shared["turn"] % self.center.turns
        self._transit.exchanged = shared.get("exchanged")
        if self._rules.algorithm.delay and (owed := shared.get("owed")):
            due, turn, joined = owed
            self._transit.owed = due, turn % self.center.turns, joined
        self._load_outer(shared)
        self._rules.schedules.load_state(shared.get("schedules", {}))
        self._transit.consensus.load_state(shared.get("consensus"))
        if self._rules.period.is_constant:
            # Perhaps another one now. An exchange that is due at the clock was not begun yet.
            known = self.clock if self._restarts else max(0, self.clock - 1)
            self._set_clock(known)
            self._levels.set_clock(known)
            self.clock = shared["clock"]
        else:
            self.telemetry.tau, self._next_due = shared["tau"], shared["next_due"]
        if own is not None:
            self._optimizers.load_look_ahead_state(own["look_ahead"])
            self.telemetry.load_counters(own["telemetry"])
        self._transit.all_reduce.load_state((own or {}).get("held_back", {}))
        self._levels.restore(None if own is None else own.get("levels"))
        agreed, said = shared.get("agreement", {}), (own or {}).get("agreement", {})
        self._agreement.load_state(agreed, said)

    def _load_outer(self, shared: Mapping[str, Any]) -> None:
        outer, kind = shared.get("outer", {}), self._rules.algorithm.kind
        known = shared.get("algorithm") == kind
        if known:
            known = self.center.load_outer(outer)
        if outer and not known and self._reports:
            warnings.warn(
                "The center's momentum starts afresh: the checkpoint holds that of"
                f" {shared['algorithm']}, by fragment, and this is {kind} in {self.center.turns}"
                " fragment(s). Keep algorithm and fragments to go on with it.",
                stacklevel=2,
            )

    def read_module(self) -> None:
        """Start again from the module's weights, which are equal on all workers."""
        self.drain()
        self.writes.forget()
        self.center.read_module()
        self._reopen()

    def _reopen(self) -> None:
        # The learning-rate finder ends a training of its own before the one that it was called in.
        self.swap.release()
        self._before_the_end, self._last_header_left = None, False
        self._transit.owed = None
        self._agreement.forget()
        if not self._transit.stop_agreed.by_exception:
            self._transit.stop_agreed = self.stopping = Stop.NO
        if not self._transit.stop_requested.by_exception:
            self._transit.stop_requested = Stop.NO

    def _begin_due(self) -> Pull:
        """Begin what is due at this step, level by level; see [Note: levels]."""
        pull: Pull = []
        if self.clock >= self._next_due:
            if self._gradients is not None:
                self._gradients.before_exchange(self.clock)
            # Stops at an exchange, not when a header is read, which is not the same step on all
            # workers.
            self._land()
            self.stopping = self._transit.stop_agreed
            self._set_clock(self.clock)
            pull = self._transit.begin(self.clock)
        pull = self._levels.begin_due(self.clock, pull)
        if not self._rules.overlap and not self._transit.restarts_workers:
            self._land()
        return pull

    def _land(self) -> None:
        self._levels.land()
        self._transit.land()

    def _set_clock(self, clock: int) -> None:
        self.clock = clock
        self.telemetry.tau, self._next_due = self._rules.period.after(clock)
