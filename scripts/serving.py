"""What a server shows of its workers: a table, and the same as lines of JSON."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_easgd.server.model import byte_size

if TYPE_CHECKING:
    from lightning_easgd.server.serving import Serving

SECONDS = 1.0
COLUMNS = {
    "worker": "worker",
    "exchanges": "exchanges",
    "per_second": "per second",
    "mb_per_second": "MB/s to the center",
    "staleness": "staleness",
    "distance": "distance",
    "missing": "missing",
    "silent_seconds": "last seen",
}


class Shown:
    """Looks at a server once a second.

    Args:
        serving: the server.
        path: of the lines of JSON.
    """

    def __init__(self, serving: Serving, path: Path) -> None:
        self._serving = serving
        self._path = path
        self._before: dict[str, tuple[float, int]] = {}
        self._console = Console()

    def until(self, ends: threading.Event) -> None:
        """Show and write until this is set."""
        print(f"serving on port {self._serving.port}; Ctrl-C ends after a snapshot", flush=True)
        with (
            open(self._path, "a") as file,
            Live(console=self._console, auto_refresh=False, transient=True) as live,
        ):
            while not ends.wait(SECONDS):
                following = self._serving.following
                if following and following.failed:
                    raise following.failed
                look = self.look()
                file.write(json.dumps(look) + "\n")
                file.flush()
                if self._console.is_terminal:
                    live.update(table(look), refresh=True)

    def look(self) -> dict[str, Any]:
        """The center and its workers now, as plain data."""
        handler = self._serving.handler
        with handler.lock:
            server, now = handler.server, time.monotonic()
            size = byte_size(server.layout) if server.has_center else 0
            alpha = server.alpha(now)
            rows = [
                self._row(name, worker, size, alpha, now)
                for name, worker in server.workers(now).items()
            ]
            refused = {reason.value: times for reason, times in server.refusals.items()}
            primary = handler.primary
            standby = None
            if primary.standing.standby:
                standby = "in step" if primary.answers(now) else "silent"
        return {
            "serves": primary.standing.serves,
            "standby": standby,
            "time": time.time(),
            "version": server.version,
            "alpha": alpha,
            "model_bytes": size,
            "refused": refused,
            "workers": rows,
        }

    def _row(self, name: str, worker: Any, size: int, alpha: float, now: float) -> dict[str, Any]:
        then, adds = self._before.get(name, (now, worker.adds))
        self._before[name] = (now, worker.adds)
        rate = (worker.adds - adds) / (now - then) if now > then else 0.0
        return {
            "worker": name,
            "exchanges": worker.adds,
            "per_second": rate,
            "mb_per_second": rate * size / 1e6,
            "staleness": worker.receipt.staleness,
            "distance": worker.norm / alpha,
            "missing": worker.missing,
            "silent_seconds": now - worker.last_seen,
        }


def table(look: dict[str, Any]) -> Table:
    """For a terminal."""
    refused = sum(look["refused"].values())
    title = f"center after {look['version']} differences, α = {look['alpha']:.4g}"
    if not look["serves"]:
        title = f"standby: {title}"
    elif look["standby"]:
        title += f", standby {look['standby']}"
    made = Table(title=title, caption=f"{refused} refused" if refused else None)
    for name, words in COLUMNS.items():
        made.add_column(words, justify="left" if name == "worker" else "right")
    for row in look["workers"]:
        made.add_row(*(_shown(row[name]) for name in COLUMNS))
    return made


def _shown(value: Any) -> Text:
    """A worker may have a name that would be markup."""
    return Text(f"{value:.3g}" if isinstance(value, float) else str(value))
