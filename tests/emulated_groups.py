"""What test_emulation.py starts on both of two hosts: workers whose groups may be the hosts.

python emulated_groups.py FOLDER WORKERS GROUPS: forks so many workers; GROUPS is a key below. At
steps 10 and 30, between two exchanges, worker r writes FOLDER/<step>-<r> and waits for
FOLDER/go-<step>.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy, Groups

GROUPS = {"none": None, "averaged": "node", "tied": Groups("node", tau=2)}
HOSTS, STEPS, TAU, PAUSES, SIZE = 2, 32, 4, (10, 30), 200_000


class Large(Toy):
    """With so many parameters that headers do not count."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1))
        self.more = torch.nn.Parameter(torch.ones(SIZE))

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.more.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def train(place: int, folder: Path, workers: int, groups: str) -> None:
    rank = workers * int(os.environ["NODE_RANK"]) + place
    os.environ.update(LOCAL_RANK=str(place), RANK=str(rank), WORLD_SIZE=str(HOSTS * workers))
    module, strategy = Large(), EASGDStrategy(tau=TAU, groups=GROUPS[groups])

    def on_train_batch_start(batch: object, batch_idx: int) -> None:
        if batch_idx in PAUSES:
            strategy.center_state_dict()  # the sum has arrived
            (folder / f"{batch_idx}-{rank}").touch()
            while not (folder / f"go-{batch_idx}").exists():
                time.sleep(0.01)

    module.on_train_batch_start = on_train_batch_start
    trainer(workers, strategy, num_nodes=HOSTS).fit(module, loader(rank, STEPS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, workers, groups = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    fork = multiprocessing.get_context("fork")
    for place in range(workers):
        fork.Process(target=train, args=(place, folder, workers, groups)).start()
