"""What fit delivers is in the module before the first hook of the end, and training can go on."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from staying import run_workers
from torch import Tensor, nn
from toy import Toy, loader, trainer

from lightning_easgd import (
    EASGD,
    Anneal,
    ConsensusTarget,
    DiLoCo,
    EASGDStrategy,
    Groups,
    Linear,
    SlowMo,
    Steps,
)

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
ENDS = ["on_train_end", "on_fit_end", "teardown"]


class WithNorm(Toy):
    """What ``happens`` does so after the last exchange that is not the last of the run."""

    def __init__(self, dtype: torch.dtype = torch.float64, happens: str = "") -> None:
        super().__init__(SGD, dtype=dtype)
        self.norm = nn.BatchNorm1d(3, affine=False, dtype=dtype)
        self.late = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=happens != "unfrozen")
        self.happens = happens

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.norm(batch[0]) * self.late, batch[1]), batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters())
        steps = [13] if self.happens == "rate falls" else []
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, 0.4)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.late.requires_grad_(self.late.requires_grad or self.global_step >= 13)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_rank == 1 and self.global_step == 14:
            if self.happens == "not finite":
                self.w.data[0, 0] = float("nan")
            if self.happens == "overflows":
                self.norm.running_var.fill_(float("inf"))


def bits(module: nn.Module) -> dict[str, bytes]:
    state = module.state_dict().items()
    return {name: as_bytes(value) for name, value in state}


def as_bytes(value: Tensor) -> bytes:
    return value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


class AtTheEnd(Callback):
    """Saves, and looks at module and center, in the hooks of the end."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.seen = path, {}
        for name in ENDS:
            setattr(self, name, partial(self.look, name))

    def look(self, name: str, trainer: pl.Trainer, module: nn.Module, *_: Any, **__: Any) -> None:
        self.seen[name] = bits(module)
        if name == "on_train_end":
            state = trainer.strategy.center_state_dict()
            self.seen["center"] = {k: as_bytes(v) for k, v in state.items() if k == "w"}
            if self.path is not None:
                trainer.save_checkpoint(self.path)


def fit(
    rank: int, workers: int, options: Any, epochs: int, path: Any = None, resume: Any = None
) -> Any:
    torch.manual_seed(0)
    own = {"dtype": torch.float64, "happens": "", "counts": [7]}
    dtype, happens, counts = (options.get(name, value) for name, value in own.items())
    options = {name: value for name, value in options.items() if name not in own}
    module, ending = WithNorm(dtype, happens), AtTheEnd(path)
    strategy = EASGDStrategy(**{"tau": 4} | options)
    fitting = trainer(workers, strategy, max_epochs=epochs, callbacks=[ending])
    data = loader(rank, counts[rank % len(counts)], dtype)
    fitting.fit(module, data, ckpt_path=resume)
    return bits(module), ending.seen


def go_on(rank: int, workers: int, options: Any, folder: Path) -> Any:
    whole, seen = fit(rank, workers, options, 3)
    path = folder / "end.ckpt"
    ended, seen = fit(rank, workers, options, 2, path)
    return whole, ended, seen, fit(rank, workers, options, 3, None, path)[0]


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "easgd": (2, {}),
    "one worker": (1, {}),
    "half": (2, {"dtype": torch.bfloat16}),
    "fragments": (2, {"fragments": 2}),
    "no last exchange": (2, {"final_exchange": False}),
    "local sgd": (2, {"algorithm": "local_sgd"}),
    "slowmo": (2, {"algorithm": "slowmo"}),
    "leader": (2, {"algorithm": "leader_sgd"}),
    "sma": (2, {"algorithm": "sma"}),
    "delayed": (2, {"algorithm": DiLoCo(delay=2, mixing_rate=0.5)}),
    "own part": (2, {"algorithm": "delayed_sgd", "fragments": 2}),
    "own part, not finite": (2, {"algorithm": "delayed_sgd", "happens": "not finite"}),
    "own part, int8": (2, {"algorithm": "delayed_sgd", "compression": "int8"}),
    "looking ahead": (2, {"algorithm": EASGD(pull=0.4, look_ahead=1)}),
    "averaged": (2, {"center_average": "polyak"}),
    "averaged and slow": (2, {"center_average": "ema", "algorithm": "bmuf"}),
    "int8": (2, {"compression": "int8", "algorithm": "local_sgd"}),
    "topk": (2, {"compression": "topk"}),
    "adaptive": (2, {"beta": ConsensusTarget(0.1)}),
    "rate falls": (2, {"algorithm": "sma", "happens": "rate falls"}),
    "not finite": (2, {"happens": "not finite"}),
    "overflows": (2, {"happens": "overflows"}),
    "unfrozen": (2, {"happens": "unfrozen"}),
    "uneven": (2, {"counts": [7, 5]}),
    "group": (4, {"groups": 2, "algorithm": DiLoCo(delay=2, mixing_rate=0.5)}),
    "tree": (4, {"groups": Groups(2, tau=2)}),
    "tree, unfrozen": (4, {"groups": Groups(2, tau=2), "happens": "unfrozen"}),
}


@pytest.mark.filterwarnings("ignore:At step")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_checkpoint_of_the_end_resumes_as_if_there_had_been_none(
    name: str, tmp_path: Path
) -> None:
    workers, options = OPTIONS[name]
    results = run_workers(go_on, workers, options, tmp_path, workers=workers, timeout=120)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    for whole, ended, seen, resumed in results:
        assert whole == resumed
        assert all(seen[hook] == ended for hook in ENDS)
        assert ended["w"] == results[0][1]["w"]
        assert as_bytes(saved["w"]) == ended["w"]
        assert (seen["center"]["w"] == ended["w"]) == ("center_average" not in options)


def end_again(rank: int, options: Any, folder: Path) -> Any:
    path = folder / "end.ckpt"
    first = fit(rank, 2, copy.deepcopy(options), 2, path)
    return first, fit(rank, 2, options, 2, None, path)


STRENGTHS: dict[str, dict[str, Any]] = {
    "a number": {},
    "linear": {"beta": Linear(0.2, 0.9)},
    "steps": {"beta": Steps([0.2, 0.9], fractions=[0.5])},
    "by epochs": {"beta": Anneal(0.2, 0.9, every=4)},
    "of a rule": {"algorithm": SlowMo(Linear(1.0, 0.2), 0.4)},
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_checkpoint_of_the_end_is_delivered_again_where_nothing_is_left_to_train(
    name: str, tmp_path: Path
) -> None:
    runs = run_workers(end_again, STRENGTHS[name], tmp_path, workers=2)
    for (ended, _), (again, seen) in runs:
        assert again == ended == seen["on_fit_end"]


def end_twice(rank: int) -> Any:
    """Two loops of a fit, as the learning-rate finder has; what the second begins with."""
    module, begun = WithNorm(), []
    fitting = trainer(2, EASGDStrategy(tau=4))

    def on_train_end() -> None:
        begun.append(bits(module))
        if len(begun) == 1:
            fitting.fit_loop.max_epochs = 2
            fitting.fit_loop.run()

    module.on_train_end = on_train_end
    module.on_train_start = lambda: begun.append(bits(module)) if begun else None
    fitting.fit(module, loader(rank, 7))
    return begun, bits(module)


def test_a_training_that_follows_within_a_fit_begins_at_what_was_delivered() -> None:
    results = run_workers(end_twice, workers=2)
    for (ended, begun, delivered), final in results:
        assert ended == begun != delivered == final
    assert results[0] == results[1]


def fail_at_the_end(rank: int, folder: Path) -> None:
    module, saving = WithNorm(), Callback()
    saving.on_exception = lambda trainer, *_: trainer.save_checkpoint(folder / "failed.ckpt")
    fitting = trainer(2, EASGDStrategy(tau=4, exchange_timeout=50), callbacks=[saving])

    def on_train_end() -> None:
        if rank == 1:
            raise OSError("worker 1 has no disk")
        fitting.save_checkpoint(folder / "end.ckpt")

    module.on_train_end = on_train_end
    fitting.fit(module, loader(rank, 7))


def test_no_worker_waits_for_one_whose_hook_of_the_end_fails(tmp_path: Path) -> None:
    one, other = run_workers(fail_at_the_end, tmp_path, workers=2, timeout=30, check=False)
    assert other.error == "OSError"
    assert one.error == "ExchangeError"
    assert "worker 1 has no disk" in one.message


def start_at_the_end(rank: int, workers: int, folder: Path) -> Any:
    fit(rank, 2, {}, 2, folder / "end.ckpt")
    if rank == 0:
        (next(folder.glob("end.ckpt.workers/**/*1.ckpt"))).unlink()
    return fit(rank, 2, {}, 3, None, folder / "end.ckpt")[0]


@pytest.mark.filterwarnings("ignore:Worker 1 starts at the center")
def test_a_worker_that_lost_its_file_starts_at_the_center(tmp_path: Path) -> None:
    one, other = run_workers(start_at_the_end, 2, tmp_path, workers=2)
    assert one["w"] == other["w"]
