"""Trainers and modules that are used several times, and what they predict and write."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from spring import Trace, Validated, assert_like_on_a_spring, state
from staying import run_workers
from torch.utils.data import DataLoader, TensorDataset
from toy import loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)


class Everything(Validated):
    """Has a step for every use; the learning rate can be searched."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.lr = 0.1

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("error", ((x @ self.w + self.b - y) ** 2).mean(), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0] @ self.w + self.b

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.w, self.b], lr=self.lr, momentum=0.5)


def evaluate(fitting: pl.Trainer, module: pl.LightningModule, **options: Any) -> Any:
    """What validation, test and prediction see, and what they leave."""
    data = loader(1, 2)
    return [
        fitting.validate(module, data, verbose=False, **options),
        fitting.test(module, data, verbose=False, **options),
        [prediction.numpy() for prediction in fitting.predict(module, data, **options)],
        state(module),
    ]


def test_a_trainer_that_is_used_again_and_again() -> None:
    def scenario(make_trainer: Any) -> Any:
        module, trace = Everything(), Trace()
        fitting = make_trainer(callbacks=[trace])
        outcomes = [evaluate(fitting, module)]
        for epochs in (1, 3):
            fitting.fit_loop.max_epochs = epochs
            fitting.fit(module, loader(0, 8), loader(1, 2))
            outcomes += [evaluate(fitting, module), fitting.global_step]
        return outcomes, trace.seen

    (_, _, first, _, second), _ = assert_like_on_a_spring(scenario)
    assert (first, second) == (8, 24)


def test_a_module_that_goes_on_under_another_tau() -> None:
    def scenario(make_trainer: Any) -> Any:
        module, trace = Everything(), Trace()
        for tau in (3, 5, 2):
            make_trainer(tau, callbacks=[trace]).fit(module, loader(0, 8))
        return trace.seen, state(module)

    assert_like_on_a_spring(scenario)


def test_the_best_checkpoint_is_the_center_that_was_best(tmp_path: Path) -> None:
    def scenario(make_trainer: Any) -> Any:
        module = Everything()
        # That of worker 0 counts where there are two.
        folder = tmp_path / (make_trainer.__name__ + os.environ["RANK"])
        saving = ModelCheckpoint(folder, monitor="loss", mode="max", save_on_train_epoch_end=False)
        options = {"callbacks": [saving], "enable_checkpointing": True, "max_epochs": 4}
        fitting = make_trainer(**options)
        fitting.fit(module, loader(0, 3), loader(1, 2))
        last = state(module)
        seen = evaluate(fitting, module, ckpt_path="best")
        assert not np.array_equal(seen[-1]["w"], last["w"])
        return seen, last, float(saving.best_model_score)

    assert_like_on_a_spring(scenario)


def go_on(rank: int, folder: Path, epochs: list[int]) -> Any:
    """Fit to each number of epochs, from the checkpoint of the one before."""
    module, trace = Everything(), Trace()
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
    options = {"callbacks": [trace, saving], "enable_checkpointing": True}
    fitting, path = trainer(2, EASGDStrategy(tau=3), **options), None
    for limit in epochs:
        fitting.fit_loop.max_epochs = limit
        fitting.fit(module, loader(rank, 8), loader(rank, 2), ckpt_path=path)
        path = folder / f"epoch={limit - 1}.ckpt"
    training = [seen for seen in trace.seen if seen[0] == "train"]
    return training, state(module)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_trainer_that_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    whole = run_workers(go_on, tmp_path, [3], workers=2)
    pieces = run_workers(go_on, tmp_path, [1, 2, 3], workers=2)
    np.testing.assert_equal(pieces, whole)


def fit_again(rank: int) -> Any:
    module, finals = Everything(), []
    begin = state(module)

    def fail(batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            raise ZeroDivisionError

    fitting = trainer(2, EASGDStrategy(tau=2))
    module.on_train_batch_start = fail
    with pytest.raises(ZeroDivisionError):
        fitting.fit(module, loader(rank, 8))
    del module.on_train_batch_start
    for again in (fitting, trainer(2, EASGDStrategy(tau=2))):
        module.load_state_dict({key: torch.from_numpy(value) for key, value in begin.items()})
        again.fit(module, loader(rank, 8))
        finals.append(state(module))
    return finals


def test_a_trainer_whose_module_raised_on_all_workers_fits_again() -> None:
    results = run_workers(fit_again, workers=2)
    for _, elsewhere in results:
        np.testing.assert_equal(elsewhere, results[0][1])
    for here, _ in results:
        np.testing.assert_equal(here, results[0][0])


def compare_elsewhere(rank: int, strategy: str, devices: int) -> Any:
    module = Everything()
    trained = trainer(2, EASGDStrategy(tau=3))
    trained.fit(module, loader(rank, 8))
    data = loader(rank, 2)
    ours = trained.test(module, data, verbose=False)
    return ours, trainer(devices, strategy).test(module, data, verbose=False), state(module)["w"]


@pytest.mark.parametrize(("strategy", "devices"), [("ddp", 2), ("auto", 1)])
def test_what_easgd_trained_is_tested_elsewhere(strategy: str, devices: int) -> None:
    one, two = run_workers(compare_elsewhere, strategy, devices, workers=2)
    assert one[0] == two[0]
    assert (one[2] == two[2]).all()
    elsewhere = [one[1][0]["error"], two[1][0]["error"]]
    if strategy == "ddp":
        assert elsewhere == [one[0][0]["error"]] * 2
    else:  # each worker by itself
        assert np.mean(elsewhere) == pytest.approx(one[0][0]["error"])


class Writer(BasePredictionWriter):
    """Keeps what it is to write: indices and predictions."""

    def __init__(self, write_interval: Any) -> None:
        super().__init__(write_interval)
        self.written: list[tuple[int, list[float]]] = []

    def keep(self, indices: Any, predictions: torch.Tensor) -> None:
        self.written += zip(indices, predictions.tolist(), strict=True)

    def write_on_batch_end(self, _: Any, __: Any, prediction: Any, indices: Any, *___: Any) -> None:
        self.keep(indices, prediction)

    def write_on_epoch_end(self, _: Any, __: Any, predictions: Any, indices: Any) -> None:
        for group, prediction in zip(indices[0], predictions, strict=True):
            self.keep(group, prediction)


def write_predictions(rank: int, interval: str, inputs: torch.Tensor) -> Any:
    module, writer = Everything(), Writer(interval)
    options = {"callbacks": [writer], "use_distributed_sampler": True}
    fitting = trainer(2, EASGDStrategy(tau=3), **options)
    fitting.fit(module, loader(rank, 8))
    fitting.predict(module, DataLoader(TensorDataset(inputs), batch_size=2))
    return writer.written, state(module)


@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_every_sample_is_predicted_once_by_the_center(interval: Any) -> None:
    inputs = torch.randn(7, 3, dtype=torch.float64)
    (one, center), (two, _) = run_workers(write_predictions, interval, inputs, workers=2)
    assert abs(len(one) - len(two)) == 1
    found = dict(one) | dict(two)
    assert sorted(i for i, _ in one + two) == list(range(7))
    expected = inputs.numpy() @ center["w"] + center["b"]
    np.testing.assert_allclose([found[i] for i in range(7)], expected, rtol=1e-12)


def tune(rank: int, folder: Path, search: bool) -> Any:
    torch.manual_seed(rank)
    module, trace, strategy = Everything(), Trace(), EASGDStrategy(tau=3)
    fitting = trainer(2, strategy, callbacks=[trace], default_root_dir=folder, max_epochs=2)
    if search:
        before = state(module)
        options = {"num_training": 8, "early_stop_threshold": None, "update_attr": False}
        found = Tuner(fitting).lr_find(module, loader(rank, 8), **options)
        assert len(found.results["loss"]) == 8
        np.testing.assert_equal(state(module), before)
        np.testing.assert_equal(state(module), _arrays(strategy.center_state_dict()))
        assert fitting.global_step == 0
        assert not trace.seen
    fitting.fit(module, loader(rank, 8), loader(rank, 2))
    return trace.seen, state(module), strategy.telemetry.exchanges


def _arrays(tensors: dict[str, torch.Tensor]) -> Any:
    return {key: value.numpy() for key, value in tensors.items()}


def test_a_search_for_the_learning_rate_leaves_no_trace(tmp_path: Path) -> None:
    searched = run_workers(tune, tmp_path, True, workers=2)
    np.testing.assert_equal(searched, run_workers(tune, tmp_path, False, workers=2))
    assert not list(tmp_path.iterdir())


def scale_batches(rank: int) -> None:
    Tuner(trainer(2, EASGDStrategy())).scale_batch_size(Everything(), loader(rank, 8))


def test_a_search_for_the_batch_size_is_refused_by_lightning() -> None:
    for outcome in run_workers(scale_batches, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert "not supported with distributed strategies" in outcome.message


def write(rank: int, folder: Path) -> None:
    own = folder / str(rank)
    own.mkdir()
    os.chdir(own)
    options = {"logger": True, "enable_checkpointing": True, "max_epochs": 2}
    trainer(2, EASGDStrategy(tau=3), **options).fit(Everything(), loader(0, 4), loader(1, 2))


def test_only_worker_0_logs_and_chooses_where_checkpoints_go(tmp_path: Path) -> None:
    run_workers(write, tmp_path, workers=2)
    names = {path.name for path in (tmp_path / "0").rglob("*") if path.is_file()}
    main = "epoch=1-step=8.ckpt"
    parts = {path.name[-7:] for path in (tmp_path / "0").rglob(f"{main}.workers/*")}
    assert {"hparams.yaml", main} <= names
    assert parts == {"-0.ckpt", "-1.ckpt"}
    assert not list((tmp_path / "1").iterdir())


def save_weights(rank: int, folder: Path) -> Any:
    saving = ModelCheckpoint(folder, "weights", save_weights_only=True)
    options = {"callbacks": [saving], "enable_checkpointing": True}
    module, strategy, centers = Everything(), EASGDStrategy(tau=3), []
    module.on_train_epoch_end = lambda: centers.append(_arrays(strategy.center_state_dict()))
    trainer(2, strategy, **options).fit(module, loader(rank, 8))
    return centers[-1]


def test_a_checkpoint_of_weights_only_is_the_center_alone(tmp_path: Path) -> None:
    center, _ = run_workers(save_weights, tmp_path, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.ckpt"]
    loaded = Everything.load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    np.testing.assert_equal(state(loaded), center)
