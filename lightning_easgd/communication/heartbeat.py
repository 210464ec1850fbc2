"""Which workers are still there, and get on: signs of life that cost no collective.

[Note: signs of life] A thread of every worker tells the key-value store that the workers met in,
once a second, that it lives and how far its worker is; see [Note: progress]. Nobody reads this
while all goes well. A worker that waits for others does. One that gives no sign is killed, stopped
or cut off. One that gives signs and takes no step is stuck. One that ended with an error has said
so.

[Note: diagnosis] The first worker that finds out who is missing publishes it, and the threads of
all workers look for that with every sign. So all end soon after the first, and know what it knew,
even if the store ends with it.

[Note: who is gone] A worker that is late may only have been stopped for a while. So nobody is taken
for missing before the timeout has passed without a sign, unless it is known to be gone: it said so,
or its process has ended on this machine, or its store did.
"""

from __future__ import annotations

import json
import time
from dataclasses import astuple

from lightning_easgd.communication.diagnosis import OVER, Sign, State, diagnose, find_late
from lightning_easgd.communication.foreign import quote
from lightning_easgd.communication.processes import Process, this_process
from lightning_easgd.communication.progress import Progress
from lightning_easgd.communication.store_thread import Store, StoreThread

_PERIOD_SECONDS = 1.0
_PATIENCE_SECONDS = 3.5
"""How long signs are looked for before somebody is said to give none."""
_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.05
_DIAGNOSIS = "diagnosis"
_LONGEST_REASON, _LONGEST_DIAGNOSIS = 2000, 1500


class Heartbeat:
    """This worker's sign of life, and a view of the others'; running from construction on.

    Args:
        rank: this worker.
        workers: how many there are.
        name: of this group of workers, which no other had or will have.
    """

    def __init__(self, rank: int, workers: int, name: str) -> None:
        self.progress = Progress()
        """Of this worker."""
        self.diagnosis = ""
        """What the first worker whose wait failed found out; empty while all goes well."""
        self._rank = rank
        self._others = [other for other in range(workers) if other != rank]
        self._number, self._count, self._since = 0, -1, time.monotonic()
        self._processes: dict[int, Process | None] = {}
        self._signs: dict[int, tuple[Sign, float]] = {}
        self._ended: dict[int, str] = {}
        self._looks_since = self._looks_until = 0.0
        self._all_read = False
        self._store = StoreThread(f"easgd-{name}", self._tell, _PERIOD_SECONDS)
        self._store.ask(self._hear)  # what it tells first is there when the workers meet

    def meet(self) -> None:
        """Learn to know the others, all of whom are there."""
        self._store.ask(self._look)

    def stop(self, reason: str = OVER, *, alone: bool = False) -> None:
        """End the sign of life.

        Args:
            reason: with which error this worker ends, which the others are told.
            alone: whether they know nothing of it; they are told at once, and then end too.
        """
        reason = reason[:_LONGEST_REASON]
        if alone and not self.diagnosis:
            self._publish(f"Worker {self._rank} ended with {quote(reason)}.")
        if self.diagnosis and self._rank == 0 and self._store.is_worker_0s:
            self._wait_for_readers()  # only worker 0 may take the store with it
        self._store.ask(lambda store: store.set(f"ended/{self._rank}", reason))
        self._store.stop()

    def diagnose(self, timeout: float) -> str:
        """Say who is missing or stuck, after a wait failed; may take some seconds.

        The first worker's answer becomes everybody's.

        Args:
            timeout: of the wait.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not (self.trouble() or self.has_looked()) and time.monotonic() < deadline:
            self.look_on()
            time.sleep(_POLL_SECONDS)
        self._store.ask(self._look)  # who is gone may have said why
        if not self.diagnosis:
            states = {other: self._state(other) for other in self._others}
            self._publish(self._explain(states, timeout))
        return self.diagnosis

    def name_the_late(self, waited: float) -> str:
        """Say who is waited for, while a wait goes on.

        Args:
            waited: seconds so far.

        Returns:
            Nothing if it is unknown, or for another worker to say: the first that waits does.
        """
        late = find_late({other: self._state(other) for other in self._others})
        if self._store.is_silent:  # it tells nothing of the others
            holder = self._store.is_worker_0s and self._rank > 0
            late = {0: "does not answer (killed, stopped or cut off)"} if holder else {}
        if not late or not all(other in late for other in range(self._rank)):
            return ""
        who = "; and for ".join(f"worker {other}, which {how}" for other, how in late.items())
        return f"Worker {self._rank} has waited {waited:.0f} s for {who}."

    def look_on(self) -> None:
        """Have the signs of the others read from now on, for some seconds."""
        now = time.monotonic()
        if now > self._looks_until:
            self._looks_since = now
            self._signs.clear()
        self._looks_until = now + 3 * _PERIOD_SECONDS + 1.0

    def leave_out(self, seconds: float) -> None:
        """Do not count the latest ``seconds``, in which this worker was stopped itself."""
        self._looks_since += seconds
        self._looks_until += seconds
        for other, (sign, at) in list(self._signs.items()):
            self._signs[other] = sign, at + seconds

    def has_looked(self) -> bool:
        """Whether signs have been read for long enough to tell who gives none."""
        return self._looked() >= _PATIENCE_SECONDS

    def idle(self) -> float:
        """Seconds since another worker got on, as far as is known."""
        now, signs = time.monotonic(), list(self._signs.values())
        return min((sign.stood + now - at for sign, at in signs), default=self._looked())

    def trouble(self) -> bool:
        """Whether a worker is known to be gone, or one has found out who is."""
        if self.diagnosis or self._store.is_gone:
            return True
        left = {other: self._ended.get(other, "") for other in self._others}
        return any(
            reason != OVER and (reason or self._is_gone(other)) for other, reason in left.items()
        )

    def _looked(self) -> float:
        now = time.monotonic()
        return now - self._looks_since if now <= self._looks_until else 0.0

    def _is_gone(self, other: int) -> bool:
        process = self._processes.get(other)
        return process is not None and process.is_gone()

    def _state(self, other: int) -> State:
        process, now = self._processes.get(other), time.monotonic()
        if reason := self._ended.get(other, ""):
            return State(ended=reason)
        if process is not None and process.is_gone():
            return State(process=process.number)
        if other not in self._processes:
            return State(absent=True)
        sign, at = self._signs.get(other, (None, now - self._looked()))
        # The first look came up to a period after it was asked for.
        silent = now - at if now - at >= _PATIENCE_SECONDS - _PERIOD_SECONDS else 0.0
        return State(silent=silent, sign=sign, stood=now - at + (sign.stood if sign else 0.0))

    def _explain(self, states: dict[int, State], timeout: float) -> str:
        if not self._store.is_silent:
            stuck_after = max(2 * _PERIOD_SECONDS, timeout / 2)
            return diagnose(states, self.progress, self._rank, stuck_after=stuck_after)
        if self._store.is_worker_0s and self._rank and self._is_gone(0):
            return diagnose({0: states[0]}, self.progress, self._rank, stuck_after=timeout)
        holder = "Worker 0" if self._store.is_worker_0s else "The store that torchrun keeps"
        how = "ended" if self._store.is_gone else "cannot be reached"
        return f"{holder} {how}, and with it who else is there is unknown."

    def _publish(self, diagnosis: str) -> None:
        """Make it everybody's, unless another worker was first; then that one's is taken."""
        self._store.ask(lambda store: self._hear(store, diagnosis))
        self.diagnosis = self.diagnosis or diagnosis

    def _wait_for_readers(self) -> None:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not (self._all_read or self._store.is_silent) and time.monotonic() < deadline:
            self.look_on()
            self._store.ask(self._see_who_read)
            time.sleep(_POLL_SECONDS)

    # What follows runs in the store's thread.

    def _tell(self, store: Store) -> None:
        now, self._number = time.monotonic(), self._number + 1
        if self.progress.count != self._count:
            self._count, self._since = self.progress.count, now
        sign = Sign.of(self.progress, self._number, now - self._since)
        store.set(f"sign/{self._rank}", sign.pack())
        if self._number == 1:
            mine = this_process()
            store.set(f"ended/{self._rank}", "")
            store.set(f"process/{self._rank}", json.dumps(astuple(mine) if mine else None))
        self._hear(store)
        if now < self._looks_until:
            self._look(store)

    def _hear(self, store: Store, diagnosis: str = "") -> None:
        """Read the diagnosis, and publish one if there is none."""
        found = store.compare_set(_DIAGNOSIS, "", diagnosis)
        if found and not self.diagnosis:
            mine = found.decode(errors="replace") == diagnosis
            self.diagnosis = (
                diagnosis if mine else f"A worker said: {quote(found, _LONGEST_DIAGNOSIS)}."
            )
            store.set(f"read/{self._rank}", "")

    def _look(self, store: Store) -> None:
        """Read who is there and how far, and who ended why."""
        for other in self._others:
            if other not in self._processes and store.check([f"process/{other}"]):
                self._processes[other] = _visible(store.get(f"process/{other}"))
        there = list(self._processes)
        keys = [f"{key}/{other}" for other in there for key in ("sign", "ended")]
        values = store.multi_get(keys) if keys else []
        told = [value.decode(errors="replace") for value in values]
        for other, text, reason in zip(there, told[::2], told[1::2], strict=True):
            sign, known = Sign.unpack(text), self._signs.get(other)
            if sign is not None and (known is None or known[0].number != sign.number):
                self._signs[other] = sign, time.monotonic()
            self._ended[other] = reason
        self._hear(store)

    def _see_who_read(self, store: Store) -> None:
        there = [other for other in self._others if not self._state(other).missing]
        self._all_read = store.check([f"read/{rank}" for rank in there])


def _visible(text: bytes) -> Process | None:
    """Another worker's process, if it can be seen from here."""
    mine = this_process()
    try:
        machine, number, started = json.loads(text)
        process = Process(str(machine), int(number), str(started))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    seen = mine is not None and process.machine == mine.machine and not process.is_gone()
    return process if seen else None
