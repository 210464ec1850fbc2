"""What torchrun starts in test_restart.py: a user's script that is struck once and starts again.

python restarted.py FOLDER WHO WHAT: at step 9 rank or node WHO does WHAT to itself, once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import Batches, Toy, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.workloads.loading import ResumableLoader

STEPS, AT, EVERY = 18, 9, 4
NESTEROV = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def lose_machine() -> None:
    """The agent that torchrun is on this machine, and its only worker."""
    os.kill(os.getppid(), signal.SIGKILL)
    kill()


def train(folder: Path, *, strike: str | None = None) -> None:
    """Train from the newest checkpoint in ``folder``; write what was delivered to ``center.pt``."""
    rank, nodes = int(os.environ["RANK"]), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    module, struck = Toy(NESTEROV), folder / "struck"

    def on_train_start() -> None:
        with (folder / f"starts{rank}").open("a") as file:
            print(fitting.world_size, fitting.global_step, file=file)

    def on_train_batch_start(batch: object, batch_idx: int) -> None:
        if strike is not None and fitting.global_step == AT and not struck.exists():
            struck.touch()
            globals()[strike]()

    module.on_train_start = on_train_start
    module.on_train_batch_start = on_train_batch_start
    saving = ModelCheckpoint(
        folder, "last", every_n_train_steps=EVERY, enable_version_counter=False
    )
    fitting = trainer(
        int(os.environ["WORLD_SIZE"]) // nodes,
        EASGDStrategy(tau=3, exchange_timeout=10),
        num_nodes=nodes,
        max_epochs=3,
        callbacks=[saving],
        enable_checkpointing=True,
    )
    torch.manual_seed(rank)
    data = ResumableLoader(Batches(rank, STEPS // 3), batch_size=None, shuffle=True)
    fitting.fit(module, data, ckpt_path="last")
    if rank == 0:
        torch.save(module.state_dict(), folder / "center.pt")


def main(folder: Path, who: str, what: str) -> None:
    node = os.environ.get("NODE")
    while node and os.environ["GROUP_WORLD_SIZE"] == "1" and not (folder / "struck").exists():
        time.sleep(0.1)  # until torchrun starts all again, with the other machine
    train(folder, strike=what if who == (node or os.environ["RANK"]) else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
