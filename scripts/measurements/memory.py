"""The memory that the strategy adds. Run as a file it is one of the processes that are measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_easgd import EASGDStrategy
from measurements.runs import Endless, fit


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


SAVE_AT = 9
"""The batch after which a checkpoint is saved, between two exchanges."""


class Memory(pl.Callback):
    """The largest resident memory in each step, in a save and at the end, every half a millisecond.

    Args:
        checkpoint: what is saved after batch ``SAVE_AT``.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.peaks: list[int] = []
        self.after: list[int] = []
        self.saving = self.ending = 0
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

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """After a step."""
        self.after.append(self.resident())
        self.peaks.append(max(self._peak, self.after[-1]))
        if args[-1] == SAVE_AT:
            self._peak = self.after[-1]
            trainer.save_checkpoint(self.checkpoint)
            self.saving = self._peak - self.after[-1]

    def on_train_epoch_end(self, *args: Any) -> None:
        """After the last step."""
        self._peak = self.resident()

    def on_fit_end(self, *args: Any) -> None:
        """Stop sampling."""
        self.ending = self._peak
        self._running = False
        self._thread.join()


def memory(millions: int, workers: int, compression: str | None) -> None:
    """Print the memory that the strategy adds, in copies of the parameters."""
    numel, tau, steps = 1_000_000 * millions, 4, 13
    found = {}
    for name in ("single", "easgd"):
        with tempfile.TemporaryDirectory() as folder:
            here = [name, str(numel), folder, str(workers), compression or ""]
            command = [sys.executable, "-m", "measurements.memory", *here]
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561", "OMP_NUM_THREADS": "1"}
            count = workers if name == "easgd" else 1
            started = [
                subprocess.Popen(
                    command,
                    cwd=Path(__file__).parents[1],
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
    if compression:
        print(f"  with compression={compression}, beside which the limits below do not count")
    print(f"  between exchanges           {(max(between) - base_after) / copy:.3f}  (at most 2)")
    print(f"  in the step of an exchange  {(max(inside) - base_peak) / copy:.3f}  (at most 3)")
    print("  each plus one bucket of", f"{25 * 2**20 / copy:.3f}")
    saving = [found[name]["saving"] / copy for name in ("easgd", "single")]
    print(f"  while saving a checkpoint   {saving[0]:.3f}, on one device {saving[1]:.3f}")
    ending = found["easgd"]["ending"] - found["single"]["ending"]
    print(f"  at the end of training      {ending / copy:.3f}")


def memory_worker(
    name: str, numel: int, folder: str, workers: int, compression: str | None
) -> None:
    """One process of :func:`memory`."""
    watch, alone = Memory(Path(folder, "saved.ckpt")), name == "single"
    elastic = EASGDStrategy(tau=4, compression=compression)
    strategy = SingleDeviceStrategy("cpu") if alone else elastic
    loader = DataLoader(Endless(torch.zeros(1)), batch_size=None)
    fit(Large(numel), loader, strategy, watch, steps=13, devices=1 if alone else workers)
    rank = os.environ["LOCAL_RANK"]
    seen = {"after": watch.after, "peaks": watch.peaks}
    seen |= {"saving": watch.saving, "ending": watch.ending}
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    contender, size, place, count, codec = sys.argv[1:]
    memory_worker(contender, int(size), place, int(count), codec or None)
