"""How long to wait for other workers: while they get on, or at most until a timeout."""

from __future__ import annotations

import logging
import time

from lightning_easgd.communication.heartbeat import Heartbeat

_LOOK_SECONDS = 0.25
_GRACE_SECONDS = 1.5
"""What has been sent before a worker ended may still arrive."""
_LONGEST_POLL_SECONDS = 1.0
"""A poll that is later than this was stopped meanwhile itself."""
_LONG_SECONDS, _LONG_ROUNDS = 5.0, 3
"""Who is waited for is said after so many seconds, and so many usual rounds."""

_log = logging.getLogger(__name__)


class Rounds:
    """How long it takes from one wait to the next, which tells a long wait from a usual one."""

    def __init__(self) -> None:
        self._step, self._began, self._seconds = -1, time.monotonic(), 0.0

    def begin_to_wait(self, step: int) -> None:
        """A wait begins, after ``step`` optimizer steps; several at one step count as one."""
        if step != self._step:
            now = time.monotonic()
            self._step, self._began, self._seconds = step, now, now - self._began

    @property
    def long(self) -> float:
        """Seconds after which a wait is a long one."""
        return max(_LONG_SECONDS, _LONG_ROUNDS * self._seconds)


class Watch:
    """One wait for others: :meth:`check` raises when it has taken too long.

    Args:
        heartbeat: of this worker.
        timeout: in seconds.
        patiently: whether to wait on as long as another worker gets on.
        long: seconds after which it is said, once, who is waited for.
    """

    def __init__(
        self, heartbeat: Heartbeat, timeout: float, *, patiently: bool, long: float
    ) -> None:
        self._heartbeat, self._timeout, self._patiently = heartbeat, timeout, patiently
        self._long, self._said = long, ""
        self._quiet = min(_LOOK_SECONDS, timeout / 4)
        self._last, self._next_look = time.monotonic(), 0.0
        self._trouble_since: float | None = None
        self.waited = 0.0
        """Seconds, without those for which this process was stopped."""

    def check(self) -> None:
        """Raise if the wait is over.

        Raises:
            TimeoutError: somebody is gone, or the timeout has passed.
        """
        now = time.monotonic()
        gap, self._last = now - self._last, now
        if gap > _LONGEST_POLL_SECONDS:
            self._heartbeat.leave_out(gap)
            gap = 0.0
        self.waited += gap
        if self.waited >= self._quiet and now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._heartbeat.look_on()
            self._look_for_trouble()
            self._look_at_the_clock()
            self._name_the_late()

    def _look_for_trouble(self) -> None:
        if not self._heartbeat.trouble():
            self._trouble_since = None
        elif self._trouble_since is None:
            self._trouble_since = self.waited
        elif self.waited - self._trouble_since > _GRACE_SECONDS:
            raise TimeoutError("another worker gave up or is gone")

    def _look_at_the_clock(self) -> None:
        stood = min(self.waited, self._heartbeat.idle()) if self._patiently else self.waited
        if stood > self._timeout and self._heartbeat.has_looked():
            how = "nobody got on" if self._patiently else "not completed"
            raise TimeoutError(f"{how} within {self._timeout:g} s")

    def _name_the_late(self) -> None:
        if self.waited > self._long and not self._said:
            self._said = self._heartbeat.name_the_late(self.waited)
            if self._said:
                _log.warning(self._said)
