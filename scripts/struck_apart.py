"""What chaos.py strikes with --center: workers at their own pace, and the server of their center.

Every worker logs what it sends before it does, and what it is told after it was told, in a file
that survives it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from emulation import EmulatedHosts
from forking import FORK, Workers, free_port, write_to
from parting import end_with
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_easgd import CenterAt, EASGDStrategy
from lightning_easgd.server.client import CenterClient
from lightning_easgd.workloads.data import Digits

TAU, STEPS, BATCH = 4, 264, 16
_PACE_SECONDS = 0.03
"""That every step sleeps, so that a run has time for what happens to it."""
_PATIENCE_SECONDS = 300.0
_LEASE_SECONDS = 2
_SERVE = Path(__file__).with_name("serve.py")
_PORT = 5700
_START_SECONDS, _END_SECONDS = 240.0, 60.0
_POLL_SECONDS = 2e-3


@dataclass(frozen=True)
class Setup:
    """Where the workers of a run are, and the servers that they know."""

    folder: Path
    addresses: list[str]
    workers: int
    hosts: EmulatedHosts | None = None


@dataclass
class Told:
    """What one worker logged, as vectors of all parameters in the order of their names."""

    start: np.ndarray | None = None
    """Where the center begins: the same for all."""
    sent: list[np.ndarray] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """Of the center, one for each difference of which the worker knows that it was added."""
    pulls: int = 0
    """Differences that were taken off the worker's weights when its last step was over."""
    moved: np.ndarray | None = None
    """The way of the worker's weights until then, without that of its optimizer's steps."""
    steps: int = 0
    delivered: np.ndarray | None = None
    accuracy: float | None = None

    @classmethod
    def read(cls, path: Path) -> Told:
        """From a file, whose last record may be missing."""
        told = cls()
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                told._take(json.loads(line))
        return told

    def _take(self, record: dict[str, Any]) -> None:
        for name, text in record.items():
            value, kept = _value(text), getattr(self, name)
            kept.append(value) if isinstance(kept, list) else setattr(self, name, value)


class Log:
    """Where a worker writes what it does, also from the thread that brings its differences.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **record: Any) -> None:
        """Fields of Told, in a line."""
        text = json.dumps({name: _text(value) for name, value in record.items()})
        with self._path.open("a") as file:
            file.write(text + "\n")

    def watch_client(self) -> None:
        """Write what clients of this process send, and what they are told."""
        add = CenterClient.add

        def written(client: CenterClient, difference: Any, *form: Any, **options: Any) -> Any:
            pairs = zip(difference.layout.names, difference.views, strict=True)
            self.write(sent=_vector(dict(pairs)))
            answer = add(client, difference, *form, **options)
            self.write(versions=answer[0].version)
            return answer

        CenterClient.add = written  # type: ignore[method-assign]


class Workload(pl.LightningModule):
    """Classifies digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        """Without momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def vector(self) -> np.ndarray:
        """All parameters."""
        return _vector(dict(self.named_parameters()))


class Followed(pl.Callback):
    """Counts how far the optimizer's own steps go, and tells the others how far a worker is."""

    def __init__(self, steps: Any, log: Log) -> None:
        self._steps, self._log = steps, log
        self._start: np.ndarray | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at each step of the optimizer."""
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(lambda *_: self._leave(pl_module))
        optimizer.register_step_post_hook(lambda *_: self._arrive(pl_module))

    def _leave(self, module: Any) -> None:
        self._before = module.vector()
        if self._start is None:  # whoever came later begins at a center that has moved
            self._start = self._before.astype(np.float64)
            self._own = np.zeros_like(self._start)

    def _arrive(self, module: Any) -> None:
        self._own += module.vector().astype(np.float64) - self._before

    def on_train_batch_start(self, *_: Any) -> None:
        """Take time."""
        time.sleep(_PACE_SECONDS)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """What the exchanges did to the weights, after the last step; a new center is no pull."""
        self._steps[trainer.global_rank] = trainer.global_step
        if trainer.global_step == STEPS:
            moved = module.vector() - self._start - self._own
            pulls = trainer.strategy.telemetry.exchanges
            self._log.write(moved=moved, pulls=pulls, steps=trainer.global_step)


def train(rank: int, setup: Setup, steps: Any) -> None:
    """What one worker does."""
    write_to(setup.folder / f"worker{rank}.log")
    warnings.filterwarnings("ignore")
    log = Log(setup.folder / f"worker{rank}.jsonl")
    log.watch_client()
    if setup.hosts is not None:
        setup.hosts.enter(rank)
        os.environ["WORLD_SIZE"] = str(setup.workers)
    together = (
        {"devices": 1, "num_nodes": setup.workers} if setup.hosts else {"devices": setup.workers}
    )
    torch.manual_seed(0)
    module, data = Workload(), _data()
    log.write(start=module.vector())
    center = CenterAt(setup.addresses, insecure=setup.hosts is not None)
    trainer = pl.Trainer(
        strategy=EASGDStrategy(center=center, exchange_timeout=_PATIENCE_SECONDS),
        accelerator="cpu",
        max_epochs=-1,
        max_steps=STEPS,
        callbacks=[Followed(steps, log)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **together,
    )
    trainer.fit(module, datamodule=data)
    log.write(delivered=module.vector(), accuracy=_accuracy(module, data))


class Server:
    """A server as users start it; SIGKILL is what chaos.py does to it.

    Args:
        folder: of its snapshots.
        hosts: emulated, of which the last is the server's; None: this machine.
        standby_of: address of the primary; None: it is the primary.
    """

    def __init__(
        self, folder: Path, hosts: EmulatedHosts | None = None, standby_of: str | None = None
    ) -> None:
        self._folder, self._hosts = folder, hosts
        port = _PORT if hosts else free_port()
        self.address = f"{hosts.address(hosts.count - 1) if hosts else '127.0.0.1'}:{port}"
        self._options = [f"folder={folder}", f"address={self.address}", f"lease={_LEASE_SECONDS}"]
        self._options += [f"tau={TAU}", "insecure=true"]
        self._options += [f"standby_of={standby_of}"] if standby_of else []
        self.start()

    def start(self) -> None:
        """Start it, also again.

        Raises:
            TimeoutError: it does not serve.
        """
        command = [sys.executable, str(_SERVE), *self._options]
        said = self._folder.with_suffix(".log")
        with open(said, "a") as log:
            before = log.tell()
            options: Any = {"stdout": log, "stderr": log}
            options["preexec_fn"] = partial(end_with, os.getpid(), signal.SIGKILL)
            if self._hosts:
                self.process = self._hosts.start(self._hosts.count - 1, command, **options)
            else:
                self.process = subprocess.Popen(command, **options)
        deadline = time.monotonic() + _START_SECONDS
        while "serving on port" not in said.read_text()[before:]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"a server does not serve; {said} says why")
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """As if its machine had lost power, but for what is written."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Let it save, and end."""
        self.process.terminate()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


class StruckApart(Workers):
    """Workers of a run, within a ``with`` block."""

    def __init__(self, setup: Setup) -> None:
        self.steps = FORK.RawArray("q", setup.workers)
        super().__init__(train, setup, self.steps, workers=setup.workers)

    def reach(self, rank: int, step: int, seconds: float) -> None:
        """Wait until all have begun, and one has taken so many steps.

        Raises:
            RuntimeError: one ended before.
            TimeoutError: it did not.
        """
        deadline = time.monotonic() + seconds
        while not all(self.steps) or self.steps[rank] < step:
            for number, process in enumerate(self.processes):
                if not process.is_alive():
                    outcome = self._receive(number)
                    raise RuntimeError(
                        f"worker {number} ended before: {outcome.error}: {outcome.message}"
                    )
            if time.monotonic() > deadline:
                raise TimeoutError(f"worker {rank} did not reach step {step}")
            time.sleep(_POLL_SECONDS)


def _data() -> Digits:
    data = Digits(
        batch_size=BATCH, image_size=8, in_channels=1, num_classes=10, mean=0.305, std=0.376
    )
    data.setup("fit")
    return data


def _accuracy(module: Workload, data: Digits) -> float:
    right = total = 0
    with torch.no_grad():
        for images, labels in data.test_dataloader():
            right += int((module.net(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def _text(value: Any) -> Any:
    """As plain data, from which the same bits come back."""
    return {value.dtype.name: value.tolist()} if isinstance(value, np.ndarray) else value


def _value(text: Any) -> Any:
    """The inverse of _text."""
    if not isinstance(text, dict):
        return text
    ((precision, numbers),) = text.items()
    return np.array(numbers, precision)


def _vector(tensors: dict[str, Tensor]) -> np.ndarray:
    flat = [tensors[name].detach().reshape(-1) for name in sorted(tensors)]
    return torch.cat(flat).numpy().copy()
