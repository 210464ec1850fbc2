"""What a worker goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_easgd.checkpoint.own_values import OwnValues
from lightning_easgd.checkpoint.random_state import restore_random_state
from lightning_easgd.checkpoint.state import SharedState, WorkerState
from lightning_easgd.communication.foreign import quote
from lightning_easgd.exchange.exchange import Exchange


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds for this worker besides what Lightning restores."""

    path: str
    """Of the main file."""
    shared: SharedState
    """The entry of the main file."""
    own: WorkerState | None
    """The worker's own file; None where it starts at the center."""
    problems: dict[int, str]
    """Why workers that should have had a file start at the center, by rank."""

    def restore(self, exchange: Exchange, values: OwnValues) -> None:
        """Give the exchange, and the module that holds the center, back what was saved of them.

        Args:
            exchange: of this worker.
            values: of this worker's module.
        """
        own = None if self.own is None else self.own.plain()
        pace = {} if self.own is None else self.own.pace
        exchange.load_state({**self.shared.plain(), **pace}, own)
        if self.own is not None:
            values.write(self.own.weights)

    def restore_random_state(self) -> None:
        """Go on with the random numbers that would have come next."""
        if self.own is not None:
            restore_random_state(self.own.random)

    def warnings(self) -> list[str]:
        """Which workers should have had a file and start at the center; a line each."""
        return [
            f"Worker {rank} starts at the center, with fresh optimizers: {quote(problem)}."
            for rank, problem in self.problems.items()
        ]

    def note(self, workers: int, *, together: bool = True) -> str:
        """How ``workers`` workers go on with what was saved, in a line.

        Args:
            workers: how many there are.
            together: whether they have told each other what they have.
        """
        before = self.shared.workers
        if not together and before == workers > 1:
            return f"{workers} workers go on, each with its own state unless it says it has none."
        if before == workers or len(self.problems) == workers:
            kept = workers - len(self.problems)
            return f"{kept} of {workers} worker(s) go on with their own state."
        rest = "the others start at the center" if workers > before else "the rest is dropped"
        return (
            f"{workers} worker(s) resume what {before} trained: the first {min(before, workers)}"
            f" keep their own state, {rest}; alpha is that of {workers} worker(s)."
        )
