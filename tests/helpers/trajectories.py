"""Trajectories that must never change by a bit: every rule, with gradients that are given.

There are no data, no random numbers and no network. All rates are short binary fractions, so that
sums, products and fused products are exact in double precision, whatever the processor does them
with. Cases that divide, or keep moments, are not exact (``exact=False``) and are compared to 1e-12.

``python tests/golden/write.py`` writes tests/golden/trajectories.json from what the code does now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from in_memory import Wire, make_worker
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from toy import trainer

from lightning_easgd import (
    BMUF,
    EASGD,
    SMA,
    CenterAverage,
    DelayedSGD,
    DiLoCo,
    Downpour,
    EASGDStrategy,
    Groups,
    LeaderSGD,
    LocalSGD,
    MDownpour,
    Often,
    PostLocalSGD,
    SlowMo,
)
from lightning_easgd.communication import Phase

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectories.json"
STEPS = 10


class Given(pl.LightningModule):
    """Three parameters whose gradients are eighths that depend on worker, step and element."""

    def __init__(self, rank: int, momentum: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.25], dtype=torch.float64))
        self.rank, self.momentum = rank, momentum
        self.seen: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        step = int(batch)
        given = [((7 * self.rank + 5 * step + 3 * i) % 16 - 8) / 8 for i in range(3)]
        g = torch.tensor(given, dtype=torch.float64)
        return (self.w * g[:2]).sum() + (self.b * g[2:]).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.values())

    def values(self) -> list[float]:
        return [*self.w.tolist(), *self.b.tolist()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        nesterov = self.momentum > 0
        return torch.optim.SGD(
            self.parameters(), lr=0.125, momentum=self.momentum, nesterov=nesterov
        )


class Steps:
    """Batches 0, 1, ...; knows where it stands, as stateful loaders do."""

    def __init__(self, count: int) -> None:
        self.count, self.position = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        while self.position < self.count:
            self.position += 1
            yield torch.tensor(self.position - 1)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@dataclass(frozen=True)
class Case:
    """One way to train."""

    options: dict[str, Any] = field(default_factory=dict)
    momentum: float = 0.0
    """Nesterov's, in the worker."""
    missing: int = 0
    """Batches that the last worker has less than the others."""
    saved: int | None = None
    """The step of a checkpoint from which training goes on."""
    exact: bool = True
    workers: tuple[int, ...] = (2, 4)

    @property
    def in_memory(self) -> bool:
        """Whether threads can train so: without collectives of groups or codecs, and files."""
        wired = self.options.keys() & {"groups", "compression"}
        warms_up = getattr(self.options.get("algorithm"), "warm_up", 0)
        return not (wired or warms_up or self.saved)


PULL = {"beta": 0.5}
RULES: dict[str, Case] = {
    "easgd": Case(PULL),
    "eamsgd": Case(PULL, momentum=0.5),
    "easgd from the parameter": Case(PULL | {"elastic_point": "parameter"}, momentum=0.5),
    "easgd with momentum": Case({"algorithm": EASGD(center_momentum=0.5), **PULL}),
    "easgd with a pull": Case({"algorithm": EASGD(pull=0.25), **PULL}),
    "easgd, looking ahead": Case({"algorithm": EASGD(pull=0.5, look_ahead=1.0), **PULL}),
    "sma": Case({"algorithm": SMA(0.5), **PULL}),
    "local_sgd": Case({"algorithm": LocalSGD()}),
    "post_local_sgd": Case({"algorithm": PostLocalSGD(warm_up=3)}),
    "downpour": Case({"algorithm": Downpour()}),
    "slowmo": Case({"algorithm": SlowMo(0.5, 0.5)}),
    "bmuf": Case({"algorithm": BMUF(0.5, 0.5)}),
    "diloco": Case({"algorithm": DiLoCo(0.5, 0.5)}),
    "diloco late": Case({"algorithm": DiLoCo(0.5, 0.5, delay=1)}),
    "diloco by adam": Case({"algorithm": DiLoCo(0.0625, optimizer=torch.optim.Adam)}, exact=False),
    "leader_sgd": Case({"algorithm": LeaderSGD(0.5, loss_smoothing=0.5)}),
    "delayed_sgd": Case({"algorithm": DelayedSGD()}),
    "delayed_sgd with a quarter": Case({"algorithm": DelayedSGD(0.25)}),
    "polyak": Case(PULL | {"center_average": "polyak"}, exact=False),
    "ema": Case(PULL | {"center_average": CenterAverage("ema", 0.25)}),
}
"""Each with every τ and, where it can, with overlap on and off."""

OFTEN = PULL | {"tau": 6, "often": Often(tau=2, below=2)}
FORMS: dict[str, Case] = {
    "mdownpour, tau=1": Case({"algorithm": MDownpour(0.5), "tau": 1}),
    "fragments": Case(PULL | {"tau": 4, "fragments": 2}),
    "fragments of diloco": Case({"algorithm": DiLoCo(0.5, 0.5), "tau": 4, "fragments": 2}),
    "int8": Case(PULL | {"tau": 2, "compression": "int8"}, exact=False),
    "bf16": Case(PULL | {"tau": 2, "compression": "bf16"}),
    "groups": Case(PULL | {"tau": 3, "groups": 2}, workers=(4,)),
    "tree": Case(PULL | {"tau": 4, "groups": Groups(2, tau=2, beta=0.5)}, workers=(4,)),
    "rho": Case({"rho": 1.0, "tau": 3}),
    "uneven": Case(PULL | {"tau": 2}, missing=3),
    "uneven local_sgd": Case({"algorithm": LocalSGD(), "tau": 2}, missing=3),
    "fragments of delayed_sgd": Case({"algorithm": DelayedSGD(), "tau": 4, "fragments": 2}),
    "uneven delayed_sgd": Case({"algorithm": DelayedSGD(), "tau": 2}, missing=3),
    "resumed delayed_sgd": Case({"algorithm": DelayedSGD(), "tau": 3}, saved=5),
    "resumed": Case(PULL | {"tau": 3}, momentum=0.5, saved=5),
    "often, behind": Case(OFTEN | {"overlap": True}, momentum=0.5),
    "often, awaited": Case(OFTEN | {"overlap": False}, momentum=0.5),
    "often with momentum": Case(OFTEN | {"algorithm": EASGD(center_momentum=0.5)}),
    "often in fragments": Case(OFTEN | {"tau": 4, "fragments": 2}),
    "often, look-ahead": Case(OFTEN | {"algorithm": EASGD(pull=0.5, look_ahead=1.0)}),
    "often, uneven": Case(OFTEN, missing=3),
    "often, resumed": Case(OFTEN, momentum=0.5, saved=5),
    "resumed slowmo": Case({"algorithm": SlowMo(0.5, 0.5), "tau": 3}, saved=5),
}


def cases(workers: int) -> dict[str, Case]:
    """All cases for so many workers, by name."""
    found = {}
    for name, case in RULES.items():
        rule = case.options.get("algorithm", EASGD())
        for tau in (1, 3):
            for overlap in (True, False) if rule.overlaps else (None,):
                way = {True: ", behind", False: ", awaited", None: ""}[overlap]
                options = {**case.options, "tau": tau, "overlap": overlap}
                found[f"{name}, tau={tau}{way}"] = _with(case, options)
    forms = {name: case for name, case in FORMS.items() if workers in case.workers}
    return found | forms


def _with(case: Case, options: dict[str, Any]) -> Case:
    return Case(options, case.momentum, exact=case.exact)


def run(
    rank: int, workers: int, folder: Path, chosen: Callable[[Case], bool] = lambda _: True
) -> dict[str, list[list[float]]]:
    """The weights of this worker after each step, then what is delivered; by case."""
    return {
        name: train(rank, workers, case, folder / str(number))
        for number, (name, case) in enumerate(cases(workers).items())
        if chosen(case)
    }


def train(rank: int, workers: int, case: Case, folder: Path) -> list[list[float]]:
    if case.saved is None:
        return fit(rank, workers, case)
    saving = ModelCheckpoint(
        folder, "last", every_n_train_steps=case.saved, enable_version_counter=False
    )
    how = {"enable_checkpointing": True, "callbacks": [saving]}
    fit(rank, workers, case, max_steps=case.saved, **how)
    return fit(rank, workers, case, folder / "last.ckpt", **how)


def fit(
    rank: int, workers: int, case: Case, ckpt_path: Path | None = None, **how: Any
) -> list[list[float]]:
    module = Given(rank, case.momentum)
    missing = case.missing if rank == workers - 1 else 0
    fitting = trainer(workers, EASGDStrategy(**case.options), **how)
    fitting.fit(module, Steps(STEPS - missing), ckpt_path=ckpt_path)
    return [*module.seen, module.values()]


def run_in_memory(wire: Wire, rank: int, case: Case) -> list[list[float]]:
    """As :func:`run`, of one case, by a thread."""
    module = Given(rank, case.momentum)
    worker = make_worker(wire, rank, module, EASGDStrategy(**case.options), steps=STEPS)
    missing = case.missing if rank == wire.workers - 1 else 0
    for number in range(STEPS - missing):

        def closure(number: int = number) -> Tensor:
            worker.exchange.before_batch()
            loss = module.training_step(torch.tensor(number), number)
            worker.exchange.after_training_step(loss)
            worker.optimizer.zero_grad()
            loss.backward()
            return loss

        worker.step(closure)
        module.on_train_batch_end()
    worker.exchange.meet(Phase.EPOCH_END)
    worker.exchange.finish(exchange=True)
    return [*module.seen, module.values()]
