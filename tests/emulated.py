"""What test_emulation.py starts on every host: two periods, a pause, and the rest of the training.

python emulated.py FOLDER EXCHANGE_TIMEOUT: at step 9 worker 0 writes FOLDER/paused and waits for
FOLDER/go; every worker writes its center to FOLDER/<rank>.pt when it is done.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

STEPS, AT = 24, 9


def train(folder: Path, exchange_timeout: float, *, pause: bool) -> None:
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    module = Toy(partial(torch.optim.SGD, lr=0.1))

    def on_train_batch_start(batch: object, batch_idx: int) -> None:
        if pause and rank == 0 and batch_idx == AT:
            (folder / "paused").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)

    module.on_train_batch_start = on_train_batch_start
    strategy = EASGDStrategy(tau=4, exchange_timeout=exchange_timeout)
    trainer(1, strategy, num_nodes=workers).fit(module, loader(rank, STEPS))
    torch.save(module.state_dict(), folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]), pause=True)
