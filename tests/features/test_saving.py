"""The module is the center while a checkpoint is made, whatever user code reads of it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from staying import run_workers
from torch import Tensor, nn
from toy import Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)
Pair = namedtuple("Pair", ["first", "second"])


class NoArguments(Toy):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


class Renamed(Toy):
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {f"model.{k}": v for k, v in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> Any:
        return super().load_state_dict({k[6:]: v for k, v in state.items()}, strict=strict)


class Halved(Toy):
    def state_dict(self, destination: Any = None, prefix: str = "") -> dict[str, Any]:
        return {k: v.half() for k, v in super().state_dict(prefix=prefix).items()}


class Live(Toy):
    """Its parameters themselves."""

    def state_dict(self, **_: Any) -> dict[str, Any]:
        return {"w": self.w, "b": self.b, "version": 3}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> Any:
        return super().load_state_dict({k: v for k, v in state.items() if k != "version"})


class Saving(Callback):
    """Saves after steps, and notes the center then."""

    def __init__(self, folder: Path | None, *steps: int) -> None:
        self.folder, self.steps, self.centers = folder, steps, {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step in self.steps:
            with trainer.strategy._fit.exchange.swapped():
                self.centers[step] = weights(module)
            trainer.save_checkpoint(f"{self.folder}/{step}.ckpt")


def fit(rank: int, module: Any, folder: Path) -> Any:
    saving = Saving(folder, 4)
    trainer(2, EASGDStrategy(tau=3), callbacks=[saving]).fit(module, loader(rank, 6))
    return saving.centers[4], weights(module)


def save_overridden(rank: int, kind: type, folder: Path) -> Any:
    center, final = fit(rank, kind(SGD), folder)
    return center, final, fit(rank, Toy(SGD), folder / "plain")[1]


@pytest.mark.parametrize("kind", [NoArguments, Renamed, Halved, Live])
def test_any_state_dict_of_the_module_is_that_of_the_center(kind: type, tmp_path: Path) -> None:
    (center, final, plain), _ = run_workers(save_overridden, kind, tmp_path, workers=2)
    assert {k: v.tobytes() for k, v in final.items()} == {k: v.tobytes() for k, v in plain.items()}
    saved = torch.load(tmp_path / "4.ckpt", weights_only=False)["state_dict"]
    name = "model.w" if kind is Renamed else "w"
    expected = center["w"].astype(np.float16) if kind is Halved else center["w"]
    assert np.array_equal(saved[name].detach().numpy(), expected)
    assert isinstance(saved[name], nn.Parameter) == (kind is Live)


def resume_overridden(rank: int, kind: type, folder: Path) -> Any:
    options = {"max_epochs": 3}
    module, again = kind(SGD), kind(SGD)
    first = trainer(2, EASGDStrategy(tau=4), **options)
    first.fit(module, loader(rank, 6))
    stopped = trainer(2, EASGDStrategy(tau=4), max_epochs=1)
    saving = Saving(folder)
    saving.on_train_epoch_end = lambda t, m: t.save_checkpoint(folder / "end.ckpt")
    stopped.callbacks.append(saving)
    stopped.fit(kind(SGD), loader(rank, 6))
    trainer(2, EASGDStrategy(tau=4), **options).fit(
        again, loader(rank, 6), ckpt_path=folder / "end.ckpt"
    )
    return weights(module), weights(again)


@pytest.mark.parametrize("kind", [NoArguments, Renamed, Live])
def test_a_module_with_a_state_dict_of_its_own_resumes_bit_for_bit(
    kind: type, tmp_path: Path
) -> None:
    for whole, resumed in run_workers(resume_overridden, kind, tmp_path, workers=2):
        assert {k: v.tobytes() for k, v in whole.items()} == {
            k: v.tobytes() for k, v in resumed.items()
        }


def aliases(module: Toy) -> dict[str, Any]:
    """Everything that may share memory with the weights."""
    w = module.w.data
    return {
        "tensor": w.cpu(),
        "view": w.T,
        "tied": OrderedDict(one=w, two=w),
        "nested": [{"list": [w]}, (w, Pair(w, 3))],
        "array": w.numpy(),
        "module": module.part,
        "copy": w.clone(),
        "text": "w",
    }


class Aliasing(Toy):
    def __init__(self) -> None:
        super().__init__(SGD)
        self.part = nn.Linear(2, 2, dtype=torch.float64)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.noted = weights(self)
        checkpoint["mine"] = aliases(self)


class AliasingCallback(Callback):
    """Keeps what it saves, which must go on being the worker's."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Aliasing, checkpoint: dict[str, Any]
    ) -> None:
        self.kept = aliases(module)
        checkpoint["its"] = self.kept


def save_aliases(rank: int, folder: Path) -> Any:
    module, callback = Aliasing(), AliasingCallback()
    saving = Saving(folder, 4)
    fitting = trainer(2, EASGDStrategy(tau=3), callbacks=[callback, saving])
    own: list[Any] = []
    module.on_train_batch_end = lambda *_: own.append(weights(module))
    fitting.fit(module, loader(rank, 6))
    alive = callback.kept["nested"][0]["list"][0].data_ptr() == module.w.data_ptr()
    return saving.centers[4], module.noted, alive, own[3]


def test_what_hooks_put_into_a_checkpoint_is_of_the_center_and_stays_so(tmp_path: Path) -> None:
    for center, noted, alive, own in run_workers(save_aliases, tmp_path, workers=2):
        assert alive  # what a callback keeps for itself is left alone
        assert np.array_equal(noted["w"], center["w"])
        assert not np.array_equal(own["w"], center["w"])
    saved = torch.load(tmp_path / "4.ckpt", weights_only=False)
    for entry in (saved["mine"], saved["its"]):
        found: list[Any] = [entry["tensor"], entry["view"].T, *entry["tied"].values()]
        found += [entry["nested"][0]["list"][0], entry["nested"][1][0], entry["copy"]]
        found += [entry["nested"][1][1].first, entry["array"]]
        assert all(np.array_equal(np.asarray(value), center["w"]) for value in found)
        assert entry["tied"]["one"].data_ptr() == entry["tied"]["two"].data_ptr()
        assert np.array_equal(entry["module"].weight.detach(), center["part.weight"])


class InGraph(Toy):
    """Saves between a forward and a backward pass, and while gradients accumulate."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(SGD)
        self.automatic_optimization, self.folder = False, folder

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        if self.folder is not None and batch_idx in (4, 5):
            self.trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def save_in_graph(rank: int, folder: Path) -> Any:
    ends = []
    for where in (None, folder):
        module = InGraph(where)
        trainer(2, EASGDStrategy(tau=2)).fit(module, loader(rank, 16))
        ends.append({k: v.tobytes() for k, v in weights(module).items()})
    return ends


def test_saving_inside_a_graph_changes_no_bit(tmp_path: Path) -> None:
    for without, saved in run_workers(save_in_graph, tmp_path, workers=2):
        assert without == saved


class Precise(pl.LightningModule):
    """Weights of several precisions, with values that are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number, dtype in enumerate((torch.bfloat16, torch.float16, torch.float64)):
            weight = torch.randn(3, dtype=torch.float64).to(dtype)
            self.register_parameter(f"p{number}", nn.Parameter(weight))
        self.register_buffer("infinite", torch.tensor([-torch.inf, 0.0]), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum((p.double() - batch[0].mean()).square().sum() for p in self.parameters())

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


def swap_precise(rank: int) -> Any:
    module, found = Precise(), []

    def note() -> list[bytes]:
        tensors = [*module.parameters(), *module.buffers()]
        return [t.detach().view(torch.uint8).numpy().tobytes() for t in tensors]

    def look(*_: Any) -> None:
        before = note()
        with fitting.strategy._fit.exchange.swapped():
            inside = note()
        found.append((before == note(), before == inside))

    module.on_train_batch_end = look
    fitting = trainer(2, EASGDStrategy(tau=3))
    fitting.fit(module, loader(rank, 6))
    return found


def test_the_worker_comes_back_bit_for_bit() -> None:
    for found in run_workers(swap_precise, workers=2):
        assert found[1:] == [(True, False)] * 5


def swap_in_vain(rank: int) -> Any:
    module, found = Precise(), []

    def fail() -> None:
        raise MemoryError

    def weights() -> list[Any]:
        return [p.tolist() for p in module.parameters()]

    def look(*_: Any) -> None:
        exchange, worker = fitting.strategy._fit.exchange, weights()
        for outer in (nullcontext(), exchange.swapped("center")):
            with outer:
                before = weights()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(exchange.center.statistics, "load_center", fail)
                    with pytest.raises(MemoryError), exchange.swapped("delivered"):
                        raise AssertionError
                found.append(weights() == before)
            found.append(weights() == worker and exchange.trains)

    module.on_train_batch_end = look
    fitting = trainer(2, EASGDStrategy(tau=3, center_average="ema"))
    fitting.fit(module, loader(rank, 6))
    return found


def test_a_center_that_cannot_be_shown_leaves_the_module_as_it_was() -> None:
    for found in run_workers(swap_in_vain, workers=2):
        assert found == [True] * 24


class Failing(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            raise ZeroDivisionError

    def on_exception(self, trainer: pl.Trainer, module: Toy, exception: BaseException) -> None:
        module.before = weights(module)
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_rank}.ckpt")
        self.after = weights(module)
        module.center = trainer.strategy.center_state_dict()
        mine = torch.tensor([7.0 + trainer.global_rank])
        assert module.all_gather(mine).tolist() == [mine.tolist()]


def save_alone(rank: int, folder: Path, fragments: int) -> Any:
    failing, module = Failing(), Toy(SGD)
    failing.folder = folder
    fitting = trainer(2, EASGDStrategy(tau=4, fragments=fragments), callbacks=[failing])
    with pytest.raises(ZeroDivisionError):
        fitting.fit(module, loader(rank, 8))
    return module.before, failing.after, {k: v.numpy() for k, v in module.center.items()}


@pytest.mark.parametrize("fragments", [1, 2])
def test_after_an_exception_the_last_known_center_is_saved(fragments: int, tmp_path: Path) -> None:
    # The sum of the exchange at step 4 is in flight then.
    both = run_workers(save_alone, tmp_path, fragments, workers=2)
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)["state_dict"]
    for before, after, center in both:
        assert np.array_equal(before["w"], after["w"])
        assert np.array_equal(saved["w"], center["w"])
        assert not np.array_equal(before["w"], center["w"])
