"""Test accuracy at equal samples."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path


def accuracy(seeds: int, folder: str) -> None:
    """Print test accuracies on Fashion-MNIST, each contender with its better learning rate."""
    contenders = {
        "ddp": ["strategy=ddp"],
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
    run = Path(folder, "-".join([*overrides, str(lr), str(seed)]).replace("=", ""))
    report = run / "report.json"
    if not report.exists():
        subprocess.run(
            [
                *(sys.executable, str(Path(__file__).parents[1] / "train.py")),
                *("experiment=fashion_mnist", *overrides, f"optimizer.lr={lr}", f"seed={seed}"),
                *("trainer.enable_progress_bar=false", f"hydra.run.dir={run}"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return 100 * json.loads(report.read_text())["tested"]["test/accuracy"]
