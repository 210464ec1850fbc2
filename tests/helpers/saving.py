"""Runs that save, and what they must have left."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import Resumable, Toy, trainer, weights

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
STEPS = 6
"""Steps of an epoch."""


def train(
    rank: int,
    folder: Path,
    *,
    module: Any = None,
    name: str = "last",
    epochs: int = 2,
    storage: Any = None,
    ckpt_path: Any = "last",
    strict: bool = True,
    **saving: Any,
) -> Any:
    """Train on, saving last.ckpt after every third step."""
    saving = {"every_n_train_steps": 3, "enable_version_counter": False} | saving
    strategy = EASGDStrategy(
        tau=4, exchange_timeout=10, strict_resume=strict, checkpoint_io=storage
    )
    fitting = trainer(
        2,
        strategy,
        callbacks=[ModelCheckpoint(folder, name, **saving)],
        enable_checkpointing=True,
        max_epochs=epochs,
    )
    torch.manual_seed(0)
    module = module or Toy(SGD)
    fitting.fit(module, Resumable(rank, STEPS), ckpt_path=ckpt_path)
    return weights(module)["w"].tolist()


def files(folder: Path) -> dict[str, int]:
    """Sizes of the files in a folder, by their paths in it."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in found}


def save_of(folder: Path) -> str:
    return torch.load(folder / "last.ckpt", weights_only=True)["lightning_easgd"]["save"]


def require_whole(folder: Path, step: int | None = None) -> None:
    """That last.ckpt is whole, of this step, and that nothing else is there."""
    save = save_of(folder)
    parts = {f"last.ckpt.workers/{save}-{rank}.ckpt" for rank in range(2)}
    assert files(folder).keys() == {"last.ckpt", *parts}
    assert step in (None, torch.load(folder / "last.ckpt", weights_only=True)["global_step"])
