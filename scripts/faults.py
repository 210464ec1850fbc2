"""What happens to workers at their own pace and to their servers, and whether anything is lost.

Each run trains digits with real processes and one fault at a random moment. It must end; workers
that were not killed must take all of their steps; and the center must be where it began plus each
difference of which a worker was told that it was added, once, to the last bit. What was taken off a
worker's weights must be what it sent, so that Σx + c moves by the optimizers' steps alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulation import EmulatedHosts, unavailable
from struck_apart import STEPS, Server, Setup, StruckApart, Told

KINDS = {
    "none": "nothing",
    "worker": "SIGKILL of a worker",
    "server": "SIGKILL of the server, started again",
    "primary": "SIGKILL of the primary, with a standby",
    "cut": "a link cut for 5 s, a worker's or the server's",
    "stop": "SIGSTOP for 5 s, of a worker or the server",
}
_AWAY_SECONDS = 5.0
_LONGEST_DELAY_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 3.0
_LIMIT_SECONDS = 600.0
"""For which a run may take on a machine with much other work; a hang takes longer."""
_ROUNDING = 1e-5
"""The most by which a worker's weights may differ from where its steps and differences lead."""


@dataclass(frozen=True)
class Fault:
    """What happens in one run."""

    kind: str
    number: int
    seed: int
    workers: int
    when: int
    """The worker whose steps say when; the one that it happens to, unless that is the server."""
    step: int
    delay_seconds: float
    of_server: bool
    pause_seconds: float
    """Until a server that was killed is started again."""

    @classmethod
    def draw(cls, kind: str, number: int, seed: int, workers: int) -> Fault:
        """One at random, the same for the same arguments."""
        chance = random.Random(f"{kind} {number} {seed} {workers}")
        return cls(
            *(kind, number, seed, workers),
            when=chance.randrange(workers),
            step=chance.randint(1, STEPS - 1),
            delay_seconds=chance.uniform(0, _LONGEST_DELAY_SECONDS),
            of_server=kind in ("server", "primary")
            or (chance.random() < 0.5 and kind in ("cut", "stop")),
            pause_seconds=chance.uniform(0, _LONGEST_PAUSE_SECONDS),
        )

    def strike(self, group: StruckApart, server: Server, hosts: EmulatedHosts | None) -> None:
        """Let it happen, and take back what can be."""
        if self.kind == "none":
            return
        group.reach(self.when, self.step, _LIMIT_SECONDS)
        time.sleep(self.delay_seconds)
        worker = group.processes[self.when]
        if self.kind == "worker":
            worker.kill()
        elif self.kind in ("server", "primary"):
            server.kill()
            if self.kind == "server":
                time.sleep(self.pause_seconds)
                server.start()
        elif self.kind == "cut":
            assert hosts is not None
            host = hosts.count - 1 if self.of_server else self.when
            hosts.cut(host)
            time.sleep(_AWAY_SECONDS)
            hosts.mend(host)
        else:
            process = server.process.pid if self.of_server else worker.pid
            os.kill(process, signal.SIGSTOP)
            time.sleep(_AWAY_SECONDS)
            os.kill(process, signal.SIGCONT)


@dataclass
class Found:
    """What one run showed."""

    fault: dict[str, Any]
    seconds: float = 0.0
    error: str | None = None
    """Why it did not end, or what was lost; None: nothing."""
    steps_lost: int = 0
    """By workers that were not killed."""
    added: int = 0
    """Differences of which workers were told that they were added."""
    lost: int = 0
    """Of these, how many are not in the center."""
    accuracy: float | None = None
    steps: list[int] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Of its fault."""
        return str(self.fault["kind"])


def run(fault: Fault, folder: Path) -> Found:
    """Train with one fault; files are left only where something went wrong."""
    torch.set_num_threads(1)  # a fork does not survive OpenMP's threads
    folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        told = _train(fault, folder)
        found = judge(fault, told)
    except (OSError, RuntimeError) as error:
        found = Found(asdict(fault), error=f"{type(error).__name__}: {error}")
    found.seconds = time.monotonic() - began
    if found.error is None:
        shutil.rmtree(folder)
    return found


def _train(fault: Fault, folder: Path) -> list[Told]:
    with ExitStack() as stack:
        hosts = None
        if fault.kind == "cut":
            hosts = stack.enter_context(EmulatedHosts(fault.workers + 1))
        servers = [Server(folder / "server", hosts)]
        stack.callback(servers[0].end)
        if fault.kind == "primary":
            servers.append(Server(folder / "standby", standby_of=servers[0].address))
            stack.callback(servers[1].end)
        addresses = [server.address for server in servers]
        group = stack.enter_context(StruckApart(Setup(folder, addresses, fault.workers, hosts)))
        fault.strike(group, servers[0], hosts)
        killed = fault.when if fault.kind == "worker" else None
        for outcome in group.collect(_LIMIT_SECONDS, without=killed):
            if outcome.error is not None:
                raise RuntimeError(f"a worker failed: {outcome.error}: {outcome.message}")
    return [Told.read(folder / f"worker{rank}.jsonl") for rank in range(fault.workers)]


def judge(fault: Fault, told: Sequence[Told]) -> Found:
    """Whether anything was lost or changed.

    Args:
        fault: what happened.
        told: what each worker logged.
    """
    killed = fault.when if fault.kind == "worker" else None
    alive = [each for rank, each in enumerate(told) if rank != killed]
    found = Found(asdict(fault), steps=[each.steps for each in told])
    found.steps_lost = sum(STEPS - each.steps for each in alive)
    found.added = sum(len(each.versions) for each in told)
    found.accuracy = alive[0].accuracy
    found.lost, wrong = _missing(told, alive[0].delivered)
    if found.steps_lost:
        wrong = f"survivors lost {found.steps_lost} steps"
    elif any(not np.array_equal(each.delivered, alive[0].delivered) for each in alive):
        wrong = "workers delivered different centers"
    elif (apart := max(_unaccounted(each) for each in alive)) > _ROUNDING:
        wrong = f"a worker's weights are {apart:.2g} from where its steps and differences lead"
    found.error = wrong
    return found


def _unaccounted(told: Told) -> float:
    """How far a worker's weights moved by anything but its steps and what it sent."""
    assert told.moved is not None
    taken = np.sum(told.sent[: told.pulls], axis=0, dtype=np.float64)
    return float(np.abs(told.moved + taken).max())


def _missing(told: Sequence[Told], delivered: np.ndarray | None) -> tuple[int, str | None]:
    """How many differences a center has not, of those that it was said to have; what is wrong."""
    pairs = [pair for each in told for pair in zip(each.versions, each.sent, strict=False)]
    added = dict(pairs)
    twice = len(pairs) - len(added)
    # Whoever was killed may have sent one more, and not have heard of it.
    open_ones = [each.sent[-1] for each in told if len(each.sent) > len(each.versions)]
    newest = max(added, default=0)
    unknown = [version for version in range(1, newest + 1) if version not in added]
    if twice or len(unknown) > len(open_ones):
        return twice, f"{twice} versions of the center were told twice, {len(unknown)} to nobody"
    ways = [added | dict(zip(unknown, open_ones, strict=False))]
    ways += [added | {newest + 1: each} for each in open_ones if not unknown]
    if any(np.array_equal(_center(told[0].start, way), delivered) for way in ways):
        return 0, None
    return _unfound(told[0].start, added, delivered), "the center is not the sum of what was added"


def _center(start: np.ndarray | None, added: dict[int, np.ndarray]) -> np.ndarray:
    """As the server adds: one after the other, in single precision."""
    assert start is not None
    center = start.copy()
    for version in sorted(added):
        center += added[version]
    return center


def _unfound(
    start: np.ndarray | None, added: dict[int, np.ndarray], delivered: np.ndarray | None
) -> int:
    """How many differences of those added explain best what the center lacks, at least one."""
    short = _center(start, added) - delivered
    sizes = [float(np.abs(each).max()) for each in added.values()]
    return max(1, round(float(np.abs(short).max()) / max(statistics.median(sizes), 1e-12)))


def run_all(
    kinds: Iterable[str],
    rounds: int,
    *,
    seed: int,
    workers: int,
    folder: Path,
    say: Callable[[str], None] = print,
) -> list[Found]:
    """All faults that the folder has no result of, in turns of their kinds; all that it has.

    Args:
        kinds: of :data:`KINDS`.
        rounds: how often each.
        seed: of the moments.
        workers: of each run.
        folder: of the results.
        say: where progress is told.
    """
    kinds = list(kinds)
    path = folder / "faults.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    known = (
        [Found(**json.loads(line)) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )
    done = {json.dumps(each.fault): each for each in known}
    faults = [Fault.draw(kind, n, seed, workers) for n in range(rounds) for kind in kinds]
    for index, fault in enumerate(faults, 1):
        key = json.dumps(asdict(fault))
        if key not in done:
            done[key] = run(fault, folder / f"{fault.kind}-{fault.number}-{seed}-{os.getpid()}")
            with path.open("a") as file:
                print(json.dumps(asdict(done[key])), file=file)
            say(f"[{index}/{len(faults)}] {told_in_words(done[key])}")
    return [done[json.dumps(asdict(fault))] for fault in faults]


def told_in_words(found: Found) -> str:
    """One result."""
    fault = found.fault
    whom = "the server" if fault["of_server"] else f"worker {fault['when']}"
    where = "" if found.kind == "none" else f" of {whom} at step {fault['step']}"
    accuracy = "-" if found.accuracy is None else f"{100 * found.accuracy:.2f} %"
    wrong = found.error or f"{found.added} differences, none lost"
    return f"{found.kind}{where}: {wrong}, {accuracy}, {found.seconds:.0f} s"


def table(results: Sequence[Found]) -> str:
    """In Markdown: a row for each kind."""
    usual = _median(results, "none")
    rows = [
        "| what, at a random moment | runs | ended | steps lost by survivors |"
        " differences added, and lost | median accuracy | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(each.kind for each in results):
        found = [each for each in results if each.kind == kind]
        ended = [each for each in found if each.accuracy is not None]
        accuracy, apart = _median(found, kind), ""
        if None not in (usual, accuracy) and kind != "none":
            apart = f" ({100 * (accuracy - usual):+.2f})"  # type: ignore[operator]
        shown = "-" if accuracy is None else f"{100 * accuracy:.2f} %{apart}"
        lost = sum(each.lost for each in found)
        seconds = statistics.median(each.seconds for each in found)
        rows.append(
            f"| {KINDS[kind]} | {len(found)} | {len(ended)} | {sum(e.steps_lost for e in found)} |"
            f" {sum(e.added for e in found)}, {lost} | {shown} | {seconds:.0f} |"
        )
    return "\n".join(rows)


def _median(results: Iterable[Found], kind: str) -> float | None:
    known = [e.accuracy for e in results if e.kind == kind and e.accuracy is not None]
    return statistics.median(known) if known else None


def require_hosts(kinds: Iterable[str]) -> None:
    """Check that links can be cut here.

    Raises:
        ValueError: they cannot; says what is missing.
    """
    if "cut" in kinds and (reason := unavailable()) is not None:
        raise ValueError(f"A link cannot be cut here: {reason}. Or leave cut out of --kinds.")
