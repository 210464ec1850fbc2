"""What is logged, and what callbacks decide by it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from spring import state
from staying import run_workers
from torchmetrics import MeanMetric
from toy import Toy, batches, loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)


class Logging(Toy):
    """Logs what the data alone decides, in the ways of ``self.log``."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.metric = MeanMetric()
        self.seen: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        self.log("both", x.mean(), on_step=True, on_epoch=True, sync_dist=True)
        self.log("highest", x.max(), on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        self.metric(x)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"sum": batch[0].sum()}, sync_dist=True, reduce_fx="sum")

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append({key: float(v) for key, v in self.trainer.logged_metrics.items()})


def log(rank: int, folder: Path) -> Any:
    outcomes = []
    for strategy in ("ddp", EASGDStrategy(tau=3)):
        module, logger = Logging(), CSVLogger(folder, name=type(strategy).__name__, version="")
        options = {"max_epochs": 2, "logger": logger, "log_every_n_steps": 1}
        fitting = trainer(2, strategy, **options)
        fitting.fit(module, loader(rank, 5), loader(rank, 2))
        final = {key: float(value) for key, value in fitting.callback_metrics.items()}
        outcomes.append((module.seen, final))
    return outcomes


@pytest.mark.filterwarnings("ignore:.*MeanMetric")
def test_metrics_are_reduced_as_under_ddp(tmp_path: Path) -> None:
    results = run_workers(log, tmp_path, workers=2)
    inputs = np.array([[x for x, _ in batches(rank, 5)] for rank in range(2)])
    for ddp, (seen, final) in results:
        assert (seen, final) == ddp
        np.testing.assert_allclose(final["both_epoch"], inputs.mean())
        np.testing.assert_allclose(final["metric"], inputs.mean(), rtol=1e-6)
        np.testing.assert_allclose(final["highest"], inputs.max())
        np.testing.assert_allclose(final["sum"], inputs[:, :2].sum())
        np.testing.assert_allclose(
            [step["both_step"] for step in seen[:5]], inputs.mean(axis=(0, 2, 3))
        )
    ddp, easgd = (tmp_path / name / "metrics.csv" for name in ("str", "EASGDStrategy"))
    assert easgd.read_text() == ddp.read_text()


class Scripted(Toy):
    """Logs given scores, one an epoch."""

    def __init__(self, scores: list[float], **options: Any) -> None:
        super().__init__(SGD)
        self.scores, self.options = scores, options

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.scores:
            self.log("score", self.scores[self.trainer.current_epoch], **self.options)


def monitor(rank: int, scores: list[list[float]], make: Any, timeout: float) -> None:
    strategy = EASGDStrategy(tau=3, exchange_timeout=timeout)
    options = {"max_epochs": 4, "callbacks": [make()], "enable_checkpointing": True}
    fitting = trainer(2, strategy, **options)
    fitting.fit(Scripted(scores[rank]), loader(rank, 4), loader(rank, 1))


def stop_early(rank: int, scores: list[list[float]], options: Any) -> Any:
    stopping = EarlyStopping("score", patience=2)
    fitting = trainer(2, EASGDStrategy(tau=3), max_epochs=6, callbacks=[stopping])
    fitting.fit(module := Scripted(scores[rank], **options), loader(rank, 4), loader(rank, 1))
    w = state(module)["w"].tolist()
    return fitting.current_epoch, stopping.stopped_epoch, float(stopping.best_score), w


@pytest.mark.parametrize(
    ("options", "best"), [({"sync_dist": True}, [2.0, 2.0]), ({"sync_dist": False}, [1.0, 3.0])]
)
def test_early_stopping_stops_all_at_one_epoch(options: Any, best: list[float]) -> None:
    # The mean is best in epoch 3; worker 0 by itself finds nothing better than in epoch 1.
    scores = [[2.0, 1.0, 1.0, 1.0, 1.0, 1.0], [6.0, 5.0, 4.0, 3.0, 4.0, 4.0]]
    results = run_workers(stop_early, scores, options, workers=2)
    epochs = 5 if options["sync_dist"] else 3
    for (ended, stopped, score, w), expected in zip(results, best, strict=True):
        assert (ended, stopped, score) == (epochs + 1, epochs, expected)
        assert w == results[0][3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(EarlyStopping, "score"), "conditioned on metric `score` which is not available"),
        (
            partial(EarlyStopping, "score", strict=False),
            "All workers are alive, but one is too late",
        ),
        (partial(ModelCheckpoint, monitor="score"), "could not find the monitored key"),
    ],
    ids=["stopping", "not strict", "checkpoint"],
)
@pytest.mark.parametrize("who", [0, 1])
def test_a_monitor_that_one_worker_does_not_log_ends_all(
    who: int, make: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = [[1.0] * 6, [1.0] * 6]
    scores[who] = []
    outcomes = run_workers(monitor, scores, make, 2.0, workers=2, check=False, timeout=40)
    assert message in outcomes[who].message
    # It waits for the decision of the other.
    assert outcomes[1 - who].error == "ExchangeError"
    assert "Lightning's " in outcomes[1 - who].message


def test_a_score_in_the_name_may_differ_by_worker(tmp_path: Path) -> None:
    scores = [[3.0, 2.0, 5.0, 1.0], [4.0, 3.0, 2.0, 1.5]]
    make = partial(ModelCheckpoint, tmp_path, "{score}", monitor="score", save_top_k=2)
    run_workers(monitor, scores, make, 60.0, workers=2)
    # Those of worker 0. Saved where all workers had found a better score, as under DDP.
    names = {"score=1.0.ckpt", "score=2.0.ckpt"}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == names
    for name in names:
        content = torch.load(tmp_path / name, weights_only=True)
        save = content["lightning_easgd"]["save"]
        other = torch.load(tmp_path / f"{name}.workers" / f"{save}-1.ckpt", weights_only=True)
        assert other["checkpoint"]["global_step"] == content["global_step"]
