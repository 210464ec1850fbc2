"""A module small enough to compute by hand, its data, and a bare trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_easgd  # noqa: F401 - registers the strategies

FEATURES, TARGETS, BATCH = 3, 2, 4


def batches(rank: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of one worker: (4, 3) inputs and (4, 2) targets, in float64."""
    rng = np.random.default_rng(1000 + rank)
    return [
        (rng.normal(size=(BATCH, FEATURES)), rng.normal(size=(BATCH, TARGETS)))
        for _ in range(count)
    ]


def initial_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {"w": rng.normal(size=(FEATURES, TARGETS)), "b": rng.normal(size=TARGETS)}


class Batches(Dataset):
    """Whole batches as items."""

    def __init__(self, rank: int, count: int, dtype: torch.dtype = torch.float64) -> None:
        self.items = [
            tuple(torch.tensor(part, dtype=dtype) for part in pair) for pair in batches(rank, count)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def loader(rank: int, count: int, dtype: torch.dtype = torch.float64) -> DataLoader:
    return DataLoader(Batches(rank, count, dtype), batch_size=None)


class Resumable:
    """A loader that knows where it stands, as stateful loaders do."""

    def __init__(self, rank: int, count: int) -> None:
        self.items = Batches(rank, count)
        self.position = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        self.position %= len(self)
        while self.position < len(self):
            self.position += 1
            yield self.items[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Toy(pl.LightningModule):
    """Least squares: mean over all elements of (x w + b - y)²."""

    def __init__(
        self,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        *,
        groups: Sequence[dict[str, Any]] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        start = initial_weights()
        self.w = nn.Parameter(torch.tensor(start["w"], dtype=dtype))
        self.b = nn.Parameter(torch.tensor(start["b"], dtype=dtype))
        self.make_optimizer = optimizer
        self.groups = groups

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return ((x @ self.w + self.b - y) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.groups is None:
            return self.make_optimizer([self.w, self.b])
        parameters = [[self.w], [self.b]]
        return self.make_optimizer(
            [{"params": p, **options} for p, options in zip(parameters, self.groups, strict=True)]
        )


def trainer(workers: int, strategy: Any, **options: Any) -> pl.Trainer:
    """A trainer of ``workers`` processes without logger, checkpoints and bars."""
    defaults = {
        "accelerator": "cpu",
        "devices": workers,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(strategy=strategy, **(defaults | options))


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    """A copy of the parameters as float64 arrays."""
    return {n: p.detach().double().numpy().copy() for n, p in module.named_parameters()}


def bits(state: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Of every array, to compare exactly."""
    return {name: value.tobytes() for name, value in state.items()}
