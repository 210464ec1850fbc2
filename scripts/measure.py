"""Measure what the strategy costs and keeps, against its contenders in the same run.

    python scripts/measure.py overhead     cost of a step between exchanges, against one device
    python scripts/measure.py memory       extra memory per worker, in copies of the parameters
    python scripts/measure.py accuracy     Fashion-MNIST: center against DDP, at equal samples
    python scripts/measure.py network      samples/s of DDP, blocking and overlapped exchanges

``network`` measures the network that its workers share: start it as one worker per host, with
torchrun or in a multi-node environment (NODE_RANK, MASTER_ADDR, MASTER_PORT, ...).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

# One thread per worker, before torch reads it; Lightning would choose by the number of devices.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_easgd import EASGDStrategy
from lightning_easgd.workloads.classifier import Classifier
from lightning_easgd.workloads.data import FashionMNIST
from lightning_easgd.workloads.models import CNN

NEVER = 10**9
"""A period τ that no run reaches."""


class Stopwatch(pl.Callback):
    """Times the batches of a fit from batch ``first`` on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """After each batch."""
        if args[2] >= self.first - 1:
            self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the end of batch ``first - 1`` to the end of the last."""
        return self.ends[-1] - self.ends[0]

    def per_batch(self) -> list[float]:
        """Seconds of each batch."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


class Endless(torch.utils.data.IterableDataset[tuple[Tensor, ...]]):
    """One batch, again and again."""

    def __init__(self, *batch: Tensor) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        """Never ends."""
        while True:
            yield self.batch


def fit(
    module: pl.LightningModule,
    data: Any,
    strategy: Strategy,
    *callbacks: pl.Callback,
    steps: int,
    **options: Any,
) -> None:
    """A bare fit of ``steps`` steps."""
    pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        callbacks=list(callbacks),
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"devices": 1} | options),
    ).fit(module, data)


def classifier(lr: float = 0.05) -> Classifier:
    """The 0.8 M-parameter CNN."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    return Classifier(CNN(1, 10, 28), optimizer, schedule="constant", num_classes=10)


class Cheap(pl.LightningModule):
    """The CNN's parameters with next to no work in a step, so that the strategy's own shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CNN(1, 10, 28)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A gradient for the last bias only."""
        return list(self.parameters())[-1].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def overhead(repetitions: int) -> None:
    """Print the cost of a step between exchanges, as a share of a 50 ms step."""
    makers: dict[str, Callable[[], Strategy]] = {
        "single device": lambda: SingleDeviceStrategy("cpu"),
        "easgd": lambda: EASGDStrategy(tau=NEVER, final_exchange=False),
    }
    cheap = Endless(torch.zeros(1))
    batch = calibrate()
    real = Endless(torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,)))
    micro: dict[str, list[float]] = {name: [] for name in makers}
    full: dict[str, list[float]] = {name: [] for name in makers}
    for repetition in range(repetitions):
        for name in rotated(makers, repetition):
            for module, data, steps, out in (
                (Cheap(), cheap, 2000, micro),
                (classifier(), real, 40, full),
            ):
                watch = Stopwatch(first=10)
                loader = DataLoader(data, batch_size=None)
                fit(module, loader, makers[name](), watch, steps=steps)
                out[name].append(statistics.median(watch.per_batch()))
    single, easgd = (statistics.median(full[name]) for name in makers)
    ratio = statistics.median(e / s for s, e in zip(*full.values(), strict=True))
    extra = statistics.median(e - s for s, e in zip(*micro.values(), strict=True))
    print(f"a step of one worker, {repetitions} repetitions in turn, medians")
    print(f"  single device  {1e3 * single:8.3f} ms")
    print(f"  easgd          {1e3 * easgd:8.3f} ms   ratio {ratio:.4f}")
    print(f"  the strategy itself, from steps of next to no work: {1e6 * extra:+.1f} us,")
    print(f"  that is {100 * extra / 0.050:+.3f} % of a 50 ms step (to reach: at most 1 %)")


def rotated(names: Iterable[str], repetition: int) -> list[str]:
    """The names, each repetition starting with another: the machine's speed drifts."""
    names = list(names)
    first = repetition % len(names)
    return names[first:] + names[:first]


def calibrate() -> int:
    """The batch size at which one step of the CNN takes about 50 ms here."""
    watch = Stopwatch(first=5)
    data = Endless(torch.rand(64, 1, 28, 28), torch.randint(10, (64,)))
    loader = DataLoader(data, batch_size=None)
    fit(classifier(), loader, SingleDeviceStrategy("cpu"), watch, steps=20)
    return max(1, round(64 * 0.050 / statistics.median(watch.per_batch())))


class Large(pl.LightningModule):
    """Eight parameters of ``numel`` / 8 elements each, and a gradient for all of them."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(numel // 8) for _ in range(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Linear in every element."""
        return torch.stack([part.sum() for part in self.parts]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, without state; gradients are kept, as in most runs they are."""
        return torch.optim.SGD(self.parameters(), lr=1e-6, foreach=False)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Keep the gradients' memory, so that it does not come and go."""
        optimizer.zero_grad(set_to_none=False)


class Memory(pl.Callback):
    """The largest resident memory in each step, sampled every half a millisecond."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self.after: list[int] = []
        self._peak, self._running = 0, True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @staticmethod
    def resident() -> int:
        """Bytes of anonymous memory that are resident."""
        text = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * int(text.split("Anonymous:")[1].split()[0])

    def _sample(self) -> None:
        while self._running:
            self._peak = max(self._peak, self.resident())
            time.sleep(5e-4)

    def on_train_batch_start(self, *args: Any) -> None:
        """Before a step."""
        self._peak = self.resident()

    def on_train_batch_end(self, *args: Any) -> None:
        """After a step."""
        self.after.append(self.resident())
        self.peaks.append(max(self._peak, self.after[-1]))

    def on_train_end(self, *args: Any) -> None:
        """Stop sampling."""
        self._running = False
        self._thread.join()


def memory(millions: int) -> None:
    """Print the memory that the strategy adds, in copies of the parameters."""
    numel, tau, steps, workers = 1_000_000 * millions, 4, 13, 2
    found = {}
    for name in ("single", "easgd"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "memory-worker", name, str(numel), folder]
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561", "OMP_NUM_THREADS": "1"}
            count = workers if name == "easgd" else 1
            started = [
                subprocess.Popen(
                    command,
                    env=os.environ | shared | {"LOCAL_RANK": str(r), "NODE_RANK": "0"},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for r in range(count)
            ]
            assert [process.wait(timeout=300) for process in started] == [0] * count
            found[name] = json.loads(Path(folder, "0.json").read_text())
    copy = 4 * numel
    base_after, base_peak = max(found["single"]["after"]), max(found["single"]["peaks"][2:])
    due = [step for step in range(tau, steps) if step % tau == 0]
    between = [m for s, m in enumerate(found["easgd"]["after"]) if s > tau]
    inside = [found["easgd"]["peaks"][step] for step in due]
    print(f"memory over one device, in fp32 copies of {millions} M parameters, {workers} workers")
    print(f"  between exchanges           {(max(between) - base_after) / copy:.3f}  (at most 2)")
    print(f"  in the step of an exchange  {(max(inside) - base_peak) / copy:.3f}  (at most 3)")
    print("  each plus one bucket of", f"{25 * 2**20 / copy:.3f}")


def memory_worker(name: str, numel: int, folder: str) -> None:
    """One process of :func:`memory`."""
    watch, workers = Memory(), 2 if name == "easgd" else 1
    strategy = EASGDStrategy(tau=4) if name == "easgd" else SingleDeviceStrategy("cpu")
    loader = DataLoader(Endless(torch.zeros(1)), batch_size=None)
    fit(Large(numel), loader, strategy, watch, steps=13, devices=workers)
    rank = os.environ["LOCAL_RANK"]
    seen = {"after": watch.after, "peaks": watch.peaks}
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


def network(repetitions: int, tau: int, steps: int) -> None:
    """Print samples/s of the contenders on the network between the workers."""
    batch, warm_up = 64, tau + 2
    makers: dict[str, Callable[[], Strategy]] = {
        "no exchange": lambda: EASGDStrategy(tau=NEVER, final_exchange=False),
        f"easgd, overlapped, tau={tau}": lambda: EASGDStrategy(tau=tau),
        f"easgd, blocking, tau={tau}": lambda: EASGDStrategy(tau=tau, overlap=False),
        "ddp": lambda: DDPStrategy(),
    }
    nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rates: dict[str, list[float]] = {name: [] for name in makers}
    waits: dict[str, list[float]] = {name: [] for name in makers}
    for repetition in range(repetitions):
        for name in rotated(makers, repetition):
            # DDP's steps take long on a slow network; fewer of them say as much.
            count = warm_up + (steps // 8 if name == "ddp" else steps)
            watch, strategy = Stopwatch(first=warm_up), makers[name]()
            data = FashionMNIST(num_classes=10, in_channels=1, image_size=28, batch_size=batch)
            options = {"devices": devices, "num_nodes": nodes}
            fit(classifier(), data, strategy, watch, steps=count, **options)
            slowest = torch.tensor([watch.seconds])
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            samples = dist.get_world_size() * batch * (len(watch.ends) - 1)
            rates[name].append(samples / slowest.item())
            telemetry = getattr(strategy, "telemetry", None)
            waits[name].append(telemetry.wait_seconds if telemetry else float("nan"))
    if dist.get_rank() == 0:
        report_network(rates, waits)


def report_network(rates: dict[str, list[float]], waits: dict[str, list[float]]) -> None:
    """The table of :func:`network`."""
    print(f"{dist.get_world_size()} workers, samples/s, median (and range) of repetitions in turn")
    for name, values in rates.items():
        to_limit = ratio(values, rates["no exchange"])
        to_ddp = ratio(values, rates["ddp"])
        spread = f"({min(values):.0f}-{max(values):.0f})"
        print(
            f"  {name:<26} {statistics.median(values):7.0f} {spread:<13}"
            f" {100 * to_limit:6.1f} % of no exchange, {to_ddp:5.2f} times ddp,"
            f" waited {statistics.median(waits[name]):.2f} s"
        )


def ratio(values: list[float], others: list[float]) -> float:
    """Median of the ratios of runs that stood next to each other."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def accuracy(seeds: int, folder: str) -> None:
    """Print test accuracies on Fashion-MNIST, each contender with its better learning rate."""
    contenders = {
        "ddp": ["strategy=ddp", "~strategy.tau"],
        "easgd, tau=4": ["strategy.tau=4"],
        "easgd, tau=16": ["strategy.tau=16"],
    }
    medians = {}
    for name, overrides in contenders.items():
        by_rate = {}
        for lr in (0.05, 0.1):
            found = [accuracy_of(folder, overrides, lr, seed) for seed in range(seeds)]
            by_rate[lr] = statistics.median(found)
            print(f"  {name:<14} lr {lr:<5} {[f'{a:.2f}' for a in found]}", flush=True)
        medians[name] = max(by_rate.values())
    print(
        f"Fashion-MNIST, 4 workers, 3 epochs, median of {seeds} seeds at the better learning rate"
    )
    for name, value in medians.items():
        print(f"  {name:<14} {value:.2f} %   {value - medians['ddp']:+.2f} points to ddp")


def accuracy_of(folder: str, overrides: list[str], lr: float, seed: int) -> float:
    """Test accuracy, in percent, of one run of scripts/train.py."""
    run = Path(folder, "-".join([*overrides, str(lr), str(seed)]).replace("=", "").replace("~", ""))
    report = run / "report.json"
    if not report.exists():
        subprocess.run(
            [
                *(sys.executable, str(Path(__file__).with_name("train.py"))),
                *("experiment=fashion_mnist", *overrides, f"optimizer.lr={lr}", f"seed={seed}"),
                *("trainer.enable_progress_bar=false", f"hydra.run.dir={run}"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return 100 * json.loads(report.read_text())["test_accuracy"]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    one = commands.add_parser("overhead", help="cost of a step between exchanges")
    one.add_argument("--repetitions", type=int, default=7)
    two = commands.add_parser("memory", help="extra memory per worker")
    two.add_argument("--millions", type=int, default=128, help="parameters, in millions")
    three = commands.add_parser("network", help="samples/s on this network")
    three.add_argument("--repetitions", type=int, default=3)
    three.add_argument("--tau", type=int, default=16, help="communication period")
    three.add_argument("--steps", type=int, default=160, help="measured steps of a run")
    four = commands.add_parser("accuracy", help="Fashion-MNIST against DDP (half an hour)")
    four.add_argument("--seeds", type=int, default=3)
    four.add_argument("--folder", default="outputs/accuracy", help="finished runs are kept here")
    hidden = commands.add_parser("memory-worker")
    for name, kind in (("name", str), ("numel", int), ("folder", str)):
        hidden.add_argument(name, type=kind)
    options = vars(parser.parse_args())
    command = options.pop("command").replace("-", "_")
    globals()[command](**options)


if __name__ == "__main__":
    main()
