"""Who is still there: signs of life that cost no collective, to name who is missing.

[Note: signs of life] A thread of every worker counts upwards in the key-value store that the
workers met in, once a second. Nobody reads it while all goes well. When an exchange fails, whose
count stands still is killed, stopped or cut off; who ended with an error has said so instead.

[Note: verdict] Who finds out first publishes it, and everybody's thread looks for that with every
count. So all end soon after the first, and know what it knew, though the store may end with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from torch.distributed import PrefixStore as _PrefixStore  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d

_PERIOD_SECONDS = 1.0
_PATIENCE_SECONDS = 3.5
_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.05
_VERDICT = "verdict"


class Liveness:
    """This worker's sign of life, and a view of the others'; running from construction on.

    Every call of the store is made by a thread that can be left behind: a store whose host was
    stopped does not answer, and does not end the call either.

    Args:
        rank: this worker.
        workers: how many there are.
        name: of this group of workers, which no other had or will have.
    """

    def __init__(self, rank: int, workers: int, name: str) -> None:
        self._rank, self._workers = rank, workers
        self._store = _PrefixStore(f"easgd-{name}", distributed_c10d._get_default_store())
        self._end = threading.Event()
        self._reason = ""
        self._answered = True
        self.verdict = ""
        """What the first worker that an exchange failed on found out; empty while all goes well."""
        self._store.set(f"left/{rank}", "")
        self._store.set(f"count/{rank}", "0")
        self._thread = threading.Thread(target=self._count, name="easgd-liveness", daemon=True)
        self._thread.start()

    def stop(self, reason: str = "") -> None:
        """End the sign of life; ``reason`` is what the others are told."""
        self._reason = reason
        self._end.set()
        if self._answered:
            self._thread.join(_ANSWER_SECONDS)

    def missing(self) -> dict[int, str]:
        """Workers that are gone, each with what is known; takes some seconds."""
        found: list[dict[int, str]] = []
        reading = threading.Thread(target=lambda: found.append(self._missing()), daemon=True)
        reading.start()
        reading.join(_PATIENCE_SECONDS + _ANSWER_SECONDS)
        if found:
            return found[0]
        self._answered = False
        # The store lives in worker 0, or in what started the workers.
        return {0: "cannot be reached, and with it who else is there"} if self._rank else {}

    def judge(self) -> str:
        """Say who is missing, after an exchange failed; takes some seconds.

        The first worker's answer becomes everybody's.
        """
        missing = {} if self.verdict else self.missing()
        if self.verdict:
            return self.verdict
        verdict = (
            "; ".join(f"Worker {rank} {reason}" for rank, reason in missing.items()) + "."
            if missing
            else "All workers are alive, but one is too late, or waits for something else, or the"
            " network between them failed."
        )
        alive = set(range(self._workers)) - missing.keys() - {self._rank}
        if self._answered:
            publishing = threading.Thread(target=self._publish, args=(verdict, alive), daemon=True)
            publishing.start()
            publishing.join(_ANSWER_SECONDS)
        return verdict

    def _publish(self, verdict: str, alive: Iterable[int]) -> None:
        try:
            if not self._store.check([_VERDICT]):
                self._store.set(_VERDICT, verdict)
            self._store.set(f"read/{self._rank}", "")
            read = [f"read/{rank}" for rank in alive]
            # Only worker 0 may take the store with it.
            while self._rank == 0 and not self._store.check(read):
                time.sleep(_POLL_SECONDS)
        except RuntimeError:
            pass  # the store is gone

    def _missing(self) -> dict[int, str]:
        others = [rank for rank in range(self._workers) if rank != self._rank]
        try:
            absent = [rank for rank in others if not self._store.check([f"count/{rank}"])]
            if absent:
                return dict.fromkeys(absent, "did not come, or ended before")
            before = {rank: self._store.get(f"count/{rank}") for rank in others}
            time.sleep(_PATIENCE_SECONDS)
            after = {rank: self._store.get(f"count/{rank}") for rank in others}
            left = {rank: self._store.get(f"left/{rank}").decode() for rank in others}
        except RuntimeError:
            return {0: "ended, and with it who else is there is unknown"} if self._rank else {}
        silent = f"gave no sign of life for {_PATIENCE_SECONDS:g} s (killed, stopped or cut off)"
        return {
            rank: left[rank] or silent
            for rank in others
            if left[rank] or before[rank] == after[rank]
        }

    def _count(self) -> None:
        count = 0
        try:
            while not self._end.wait(_PERIOD_SECONDS):
                count += 1
                self._store.set(f"count/{self._rank}", str(count))
                if not self.verdict and self._store.check([_VERDICT]):
                    self.verdict = self._store.get(_VERDICT).decode()
                    self._store.set(f"read/{self._rank}", "")
            if self._reason:
                self._store.set(f"left/{self._rank}", self._reason)
        except RuntimeError:
            pass  # the store is gone, with the worker or launcher that held it
