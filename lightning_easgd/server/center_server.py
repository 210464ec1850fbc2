"""The center of workers that come at their own pace: state, rule and table of workers.

One pure object: time is handed in, and whoever has it calls one method at a time. A method does
all that it was asked, or raises ``Refused`` and leaves the center as it was.

[Note: exactly once] The key of a difference is (worker, incarnation, sequence). The last sequence
of each worker and its receipt are kept, in snapshots too, together with the center that has them.
A worker asks again with the same sequence until it has the receipt, and sends no other difference
before. So a center, also one that was restored, has every difference once, or not yet.

Letters: c the center, d `difference`, α `alpha`, β `beta`, p the number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server.center_state import CenterState
from lightning_easgd.server.checks import require_finite, require_later, require_samples
from lightning_easgd.server.model import describe, layout_of, require_same_model
from lightning_easgd.server.refusal import Refusal, Refused
from lightning_easgd.server.roster import Roster, Worker
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.values import Added, Keeper, Receipt, Snapshot, SnapshotError, Terms


class CenterServer:
    """The center, and the table of its workers.

    Args:
        settings: algorithm, strength and limits.
        keeper: gets all that is added, first; None: it is lost with this object.

    Attributes:
        version: how many differences the center has taken in.
        refusals: how often what was asked was refused, by reason.
    """

    def __init__(self, settings: Settings | None = None, keeper: Keeper | None = None) -> None:
        self.settings = settings or Settings()
        self.keeper = keeper
        self.version = 0
        self.refusals: Counter[Refusal] = Counter()
        self._roster = Roster(self.settings)
        self._state: CenterState | None = None
        self._founder: tuple[str, int] | None = None

    @property
    def has_center(self) -> bool:
        """Whether a worker has brought its weights."""
        return self._state is not None

    @property
    def layout(self) -> FlatLayout:
        """Of the model.

        Raises:
            Refused: no worker has brought one.
        """
        return self._require_state().center.layout

    def join(
        self,
        worker: str,
        incarnation: int,
        model: FlatLayout,
        *,
        now: float,
        weights: FlatVector | None = None,
        more: Mapping[str, FlatVector] | None = None,
        moves: int = 0,
    ) -> Terms:
        """Let a worker in; asked again, the answer is the same.

        Args:
            worker: its name.
            incarnation: of its process; larger than that of any earlier one of this name.
            model: of the worker.
            now: seconds, of any clock that does not go back.
            weights: become the center if there is none yet; copied.
            more: what goes with it, as of :meth:`vectors`, from an earlier server.
            moves: how often that center had moved.

        Raises:
            Refused: the model is another one, the weights are not finite or cannot be kept, a
                later process has this name, or there are too many workers.
        """
        with self._counting():
            if self._state:
                require_same_model(model, self.layout)
            elif weights:
                require_same_model(weights.layout, model)
                for vector in (weights, *(more or {}).values()):
                    require_finite(vector.norm(), "The start")
            known = self._roster.join(worker, incarnation, version=self.version, now=now)
            if weights and not self._state:
                self._begin_at(weights, more or {}, moves)
                self._founder, known.got = (worker, incarnation), self.version
            average = self.settings.average
            return Terms(
                algorithm=self.settings.kind["algorithm"],
                options=vars(self.settings.rule),
                average=None if average is None else asdict(average),
                tau=self.settings.period,
                even=self.settings.even,
                alpha=self.alpha(now),
                version=self.version,
                sequence=known.receipt.sequence,
                has_center=self.has_center,
                began=self._founder == (worker, incarnation),
            )

    def period(self, worker: str, incarnation: int, speed: float, *, now: float) -> int:
        """τ of a worker that says its steps per second, 0 if it does not know; raises Refused."""
        known = self._roster.find(worker, incarnation, now=now)
        self._roster.hear_speed(known, speed)
        return self._roster.period(known, now=now)

    def alpha(self, now: float) -> float:
        """α = β/p of the next difference; 1 under a rule whose workers restart at the center."""
        if self.settings.rule.resets_to_center:
            return 1.0
        return self.settings.beta / self._roster.count(now)

    def get(self, worker: str, incarnation: int, *, now: float) -> tuple[int, FlatVector]:
        """The version of the center, and the center itself: read it before the next call.

        Raises:
            Refused: the worker is not known or asks too often, it is not its turn, or there is no
                center.
        """
        with self._counting():
            known = self._roster.admit(worker, incarnation, now=now)
            center = self._require_state().center
            self._roster.require_turn(worker, now=now)
            known.got = self.version
            return self.version, center

    def vectors(
        self, worker: str, incarnation: int, *, now: float
    ) -> tuple[int, dict[str, FlatVector]]:
        """As :meth:`get`, with what goes with the center, by name."""
        version, _ = self.get(worker, incarnation, now=now)
        return version, self._require_state().vectors()

    def delivered(self) -> FlatVector:
        """A copy of the average of the center if there is one, else of the center.

        Raises:
            Refused: there is no center.
        """
        state = self._require_state()
        return (state.average or state.center).clone()

    def add(
        self,
        worker: str,
        incarnation: int,
        sequence: int,
        difference: FlatVector,
        *,
        now: float,
        samples: float = 1.0,
        buffers: Mapping[str, int] | None = None,
    ) -> Receipt:
        """Add a difference to the center, once; asked again, the answer is the same.

        Args:
            worker: its name.
            incarnation: of its process.
            sequence: of the difference: 1, 2, ... in this incarnation.
            difference: α (x - c), or what the worker's steps made, as the rule has it; may be
                overwritten.
            now: as of :meth:`join`.
            samples: that the worker learned from since its last difference.
            buffers: how many elements of each precision, at the end, are values of buffers, to
                which those of the center go 1/p of the way.

        Raises:
            Refused: the worker is not known, the sequence is an earlier one, the difference is not
                finite or of another model, it came too soon or cannot be kept, or it is another
                worker's turn.
        """
        with self._counting():
            known = self._roster.admit(worker, incarnation, now=now)
            if sequence == known.receipt.sequence and sequence > 0:
                known.repeated += 1
                return known.receipt
            require_later(sequence, known.receipt.sequence)
            require_same_model(difference.layout, self.layout)
            self._roster.require_turn(worker, now=now)
            require_samples(samples)
            buffers = dict(buffers or {})
            self._require_state().to_moves_(difference, buffers, 1 / self._roster.count(now))
            norm = difference.norm()
            require_finite(norm, "The difference")
            staleness = self.version - known.got
            weight = self._weight(worker, samples, staleness, norm, now)
            receipt = Receipt(sequence, self.version + 1, staleness, weight)
            scaled = _scaled(difference, weight)
            facts = (worker, incarnation, receipt, norm, samples, known.got)
            added = Added(*facts, scaled, buffers)
            if self.keeper:
                self.keeper.add(added)
            self._take_in(added, known)
            return receipt

    def exchange(
        self,
        worker: str,
        incarnation: int,
        sequence: int,
        difference: FlatVector,
        **options: Any,
    ) -> tuple[Receipt, FlatVector]:
        """As :meth:`add`, and the center that it leads to, as of :meth:`get`."""
        receipt = self.add(worker, incarnation, sequence, difference, **options)
        self._roster.workers[worker].got = self.version
        return receipt, self._require_state().center

    def leave(self, worker: str, incarnation: int, *, now: float) -> None:
        """Let a worker go.

        Raises:
            Refused: it is not known.
        """
        with self._counting():
            self._roster.leave(worker, incarnation, now=now)

    def beat(self, worker: str, incarnation: int, *, now: float) -> None:
        """A sign of life; raises as :meth:`leave`."""
        with self._counting():
            self._roster.find(worker, incarnation, now=now)

    def workers(self, now: float) -> dict[str, Worker]:
        """The workers that are there, by name."""
        return {name: self._roster.workers[name] for name in self._roster.live(now)}

    def snapshot(self) -> Snapshot:
        """All that the server knows, as a copy.

        Raises:
            Refused: there is no center.
        """
        state = self._require_state()
        facts = {
            **self.settings.kind,
            "model": describe(state.center.layout),
            "version": self.version,
            "roster": self._roster.state(),
        }
        return Snapshot(state.tensors(), facts)

    def restore(self, snapshot: Snapshot, *, now: float) -> None:
        """Go on from a snapshot, in place of all that the server knew.

        Raises:
            SnapshotError: it is of another algorithm, average or shard.
        """
        facts, tensors = snapshot.facts, snapshot.tensors
        ours = self.settings.kind
        theirs = {name: facts.get(name, "0 of 1") for name in ours}
        if theirs != ours:
            said = [", ".join(f"{n}={v}" for n, v in each.items()) for each in (theirs, ours)]
            raise SnapshotError(
                f"The snapshot is of {said[0]}, and this server has {said[1]}. Give the server the"
                " same options, or begin in an empty folder."
            )
        layout = layout_of(facts["model"], self.settings.limits.most_bytes)
        state = CenterState.from_tensors(self.settings, layout, tensors)
        roster = Roster(self.settings)
        roster.load_state(facts["roster"], now=now)
        self._state, self._roster, self.version = state, roster, facts["version"]

    def replay(self, added: Added, *, now: float) -> None:
        """Add once more what a server with the same state has added, to the same bits.

        Raises:
            SnapshotError: another difference comes next, or another server added it.
        """
        known = self._roster.workers.get(added.worker)
        late = known is not None and added.incarnation < known.incarnation
        if added.receipt.version != self.version + 1 or late:
            raise SnapshotError(
                f"Difference {added.receipt.version} of worker '{added.worker}' does not follow"
                f" center {self.version}."
            )
        name, incarnation = added.worker, added.incarnation
        known = self._roster.knows(name, incarnation, got=added.got, now=now)
        known.got = added.got
        self._take_in(added, known)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except Refused as refused:
            self.refusals[refused.reason] += 1
            raise

    def _begin_at(self, center: FlatVector, more: Mapping[str, FlatVector], moves: int) -> None:
        self._state = CenterState(self.settings, center.clone())
        self._state.take_over(more)
        self.version = moves
        try:
            if self.keeper:
                self.keeper.begin(self.snapshot())
        except Refused:
            self._state, self.version = None, 0
            raise

    def _require_state(self) -> CenterState:
        if self._state is None:
            raise Refused(
                Refusal.NO_CENTER,
                "The server has no center yet. Join with weights, which become the center.",
            )
        return self._state

    def _weight(
        self, worker: str, samples: float, staleness: int, norm: float, now: float
    ) -> float:
        weight = 1.0
        if self.settings.staleness == "scale":
            weight /= 1 + staleness
        if self.settings.weight == "samples":
            weight *= self._roster.samples_weight(worker, samples, now=now)
        most = self.settings.max_norm
        if most is not None and weight * norm > most:
            weight = most / norm
        return weight

    def _take_in(self, added: Added, known: Worker) -> None:
        self._require_state().move_(added)
        self.version = added.receipt.version
        self._roster.pass_turn(added.worker)
        known.note(added)


def _scaled(difference: FlatVector, weight: float) -> FlatVector:
    """Multiplied in place."""
    if weight != 1:
        for part in difference.parts:
            part.mul_(weight)
    return difference
