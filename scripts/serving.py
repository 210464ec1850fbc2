"""What a server shows of its workers: a table, and the same as lines of JSON."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_easgd.server.model import byte_size

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lightning_easgd.server.serving import Serving

log = logging.getLogger(__name__)

SECONDS = 1.0
"""Between two looks."""
COLUMNS = {
    "worker": "worker",
    "exchanges": "exchanges",
    "per_second": "per second",
    "mb_in_per_second": "MB/s in",
    "mb_out_per_second": "MB/s out",
    "staleness": "staleness",
    "distance": "distance",
    "missing": "missing",
    "silent_seconds": "last seen",
}


class Watched:
    """Looks at a server again and again.

    Args:
        serving: the server.

    Attributes:
        port: on which workers are answered.
        close: ends the server.
    """

    def __init__(self, serving: Serving) -> None:
        self.port, self.close = serving.port, serving.close
        self._serving = serving
        self._before: dict[str, tuple[float, int, int, int]] = {}

    def look(self) -> dict[str, Any]:
        """The center and its workers now, as plain data.

        Raises:
            Exception: the server is a standby, and can no longer follow its primary.
        """
        if (following := self._serving.following) and following.failed:
            raise following.failed
        handler = self._serving.handler
        with handler.lock:
            server, now = handler.server, time.monotonic()
            size = byte_size(server.layout) if server.has_center else 0
            alpha = server.alpha(now)
            rows = [
                self._row(name, worker, alpha, now) for name, worker in server.workers(now).items()
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

    def _row(self, name: str, worker: Any, alpha: float, now: float) -> dict[str, Any]:
        counts = (now, worker.adds, worker.received, worker.sent)
        before, self._before[name] = self._before.get(name, counts), counts
        seconds, *more = (a - b for a, b in zip(counts, before, strict=True))
        # Fewer than before are those of a later process of this name.
        adds, received, sent = (max(0, each) / seconds if seconds > 0 else 0.0 for each in more)
        return {
            "worker": name,
            "exchanges": worker.adds,
            "per_second": adds,
            "mb_in_per_second": received / 1e6,
            "mb_out_per_second": sent / 1e6,
            "staleness": worker.receipt.staleness,
            "distance": worker.norm / alpha,
            "missing": worker.missing,
            "silent_seconds": now - worker.last_seen,
        }


def together(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """What servers of one center show, as of one server; of counts the smallest."""
    names = sorted({row["worker"] for look in looks for row in look["workers"]})
    rows = [[r for look in looks for r in look["workers"] if r["worker"] == n] for n in names]
    reasons = sorted({reason for look in looks for reason in look["refused"]})
    return {
        "serves": all(look["serves"] for look in looks),
        "standby": _standby([look["standby"] for look in looks]),
        "time": min(look["time"] for look in looks),
        "version": min(look["version"] for look in looks),
        "versions": [look["version"] for look in looks],
        "alpha": min(look["alpha"] for look in looks),
        "model_bytes": sum(look["model_bytes"] for look in looks),
        "refused": {
            reason: sum(look["refused"].get(reason, 0) for look in looks) for reason in reasons
        },
        "workers": [_one_row(of_one) for of_one in rows],
    }


def _standby(said: list[str | None]) -> str | None:
    return "silent" if "silent" in said else said[0] if len(set(said)) == 1 else "missing"


def _one_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one worker at all servers."""
    how: dict[str, Any] = {
        "exchanges": min,
        "per_second": min,
        "mb_in_per_second": sum,
        "mb_out_per_second": sum,
        "staleness": max,
        "distance": lambda distances: math.hypot(*distances),
        "missing": sum,
        "silent_seconds": max,
    }
    found = {name: combine([row[name] for row in rows]) for name, combine in how.items()}
    return {"worker": rows[0]["worker"], **found}


class Shown:
    """Shows what is seen, and writes it.

    Args:
        path: of the lines of JSON.
        writer: to TensorBoard; None: it is not written there.
    """

    def __init__(self, path: Path, writer: SummaryWriter | None = None) -> None:
        self._path = path
        self._writer = writer
        self._cannot = ""
        """Why the latest look was not written."""
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Shown:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._writer:
            self._writer.close()

    def show(self, look: dict[str, Any]) -> None:
        """Show and write a look; the server goes on where it cannot be written."""
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(look) + "\n")
            self._cannot = ""
        except OSError as error:
            if self._cannot != str(error):
                self._cannot = str(error)
                log.error("What the table shows is not written to %s: %s", self._path, error)
        if self._writer:
            for name, value in scalars(look).items():
                self._writer.add_scalar(name, value, look["version"], look["time"])
        if self._console.is_terminal:
            self._live.update(table(look), refresh=True)


def scalars(look: dict[str, Any]) -> dict[str, float]:
    """Of the center, and of each worker what the table has."""
    found = {"center/alpha": look["alpha"], "center/refused": sum(look["refused"].values())}
    found["center/workers"] = len(look["workers"])
    for row in look["workers"]:
        found |= {f"{name}/{row['worker']}": row[name] for name in COLUMNS if name != "worker"}
    return found


def to_tensorboard(folder: Path) -> SummaryWriter:
    """What writes there.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "tensorboard=true needs pip install -e '.[tensorboard]'. Or leave it out:"
            " served.jsonl has the same."
        ) from error
    return SummaryWriter(str(folder), flush_secs=10)


def table(look: dict[str, Any]) -> Table:
    """For a terminal."""
    refused = sum(look["refused"].values())
    least, most = look["version"], max(look.get("versions", [look["version"]]))
    after = f"{least}" if least == most else f"{least} to {most}"
    title = f"center after {after} differences, α = {look['alpha']:.4g}"
    if "versions" in look:
        title = f"{title}, {len(look['versions'])} shards"
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
