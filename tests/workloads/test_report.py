"""What a run was, reached and cost."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from processes import run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGD, DelayedSGD, EASGDStrategy, LocalSGD
from lightning_easgd.workloads import experiment
from lightning_easgd.workloads.report import Report, name_model, samples_of

SGD = partial(torch.optim.SGD, lr=0.1)


class MyRule(LocalSGD):
    """A rule of a user's own."""


def run(strategy: Any, **options: Any) -> Report:
    module = Toy(SGD)
    module.train_dataloader = lambda: loader(0, 8)
    fitting = trainer(1, strategy, **options)
    return experiment.run(fitting, module, None, train=True, test=False, ckpt_path=None)


def under_rules(rank: int) -> list[Any]:
    """What is reported under each of some rules, one after the other."""
    options: list[dict[str, Any]] = [
        {},
        {"rho": 0.5},
        {"algorithm": "local_sgd"},
        {"algorithm": MyRule()},
        {"algorithm": "downpour", "center_average": "polyak"},
        {"algorithm": EASGD(pull=0.4, look_ahead=1)},
        {"algorithm": DelayedSGD(0.25)},
    ]
    reports = [run(EASGDStrategy(tau=4, **some)) for some in options]
    rules = [re.findall(r"^  rule +(.*)$", report.table(), re.MULTILINE) for report in reports]
    return [(report.strategy, report.tau, report.strength, *rules.pop(0)) for report in reports]


def test_a_rule_goes_by_its_name_and_has_a_row_for_its_options() -> None:
    (found,) = run_workers(under_rules, workers=1)
    assert found == [
        ("easgd", 4, "beta=0.9"),
        ("easgd", 4, "rho=0.5"),
        ("local_sgd", 4, None),
        ("MyRule", 4, None),
        ("adownpour", 4, None, "Downpour(average=False)"),
        ("easgd", 4, "beta=0.9", "EASGD(center_momentum=0.0, pull=0.4, look_ahead=1.0)"),
        ("delayed_sgd", 4, None, "DelayedSGD(own=0.25)"),
    ]


def test_what_was_run_is_said_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    report = run("auto", max_epochs=2)
    assert report.strategy == "single_device"
    assert report.learning_rate == 0.1
    assert (report.model, report.parameters, report.data) == ("Toy", 8, "Toy")
    assert (report.seed, report.steps, report.bytes_sent) == (None, 16, None)
    assert report.versions["torch"] == torch.__version__
    assert report.train_seconds is not None
    assert report.samples_per_second == pytest.approx(16 * 4 / report.train_seconds)
    assert json.loads(report.to_json())["steps"] == 16
    assert "  strategy    single_device, lr=0.1\n" in report.table()
    assert "exchanges" not in report.table()


def test_the_waits_of_workers_are_in_the_table() -> None:
    known = {"strategy": "easgd", "train_seconds": 20.0}
    for waits, shown in (([1.25, 0.5], "1.25, 0.50"), ([1.0, 4.0, *[2.0] * 7], "1.00 to 4.00")):
        table = Report(workers=2, worker_wait_seconds=waits, **known).table()
        assert f"  waited by each worker  {shown} of 20.0 s\n" in table
    assert "waited" not in Report(workers=2, **known).table()
    at_a_server = Report(workers=2, staleness=0.5, wait_seconds=1.25, **known).table()
    assert "  waited by worker 0     1.25 s, for the server\n" in at_a_server


def test_a_rule_without_options_has_no_row_at_a_server_either() -> None:
    for pull, rows in ((None, 0), (0.4, 1)):
        table = Report(workers=2, strategy="easgd_async", rule=str(EASGD(pull=pull))).table()
        assert table.count("  rule ") == rows


def test_samples_are_rows_of_the_first_tensor_of_a_batch() -> None:
    rows, none = torch.zeros(5, 2), torch.zeros(())
    for batch, count in (
        (rows, 5),
        (none, 1),
        ({"name": "x", "image": [rows, none]}, 5),
        ("text", 0),
        (object(), 0),
        (([], rows), 5),
    ):
        assert samples_of(batch) == count, batch


def test_a_network_in_a_module_is_named_with_it() -> None:
    class Wraps(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = torch.nn.Linear(2, 2), torch.nn.MSELoss()

    assert name_model(Wraps()) == "Wraps of Linear"
    assert name_model(Toy(SGD)) == "Toy"


class WithTest(Toy):
    """Has a test, but no data for it."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs nothing."""


def test_a_missing_test_is_said_before_training() -> None:
    empty = pl.LightningDataModule()
    for module, data, said in (
        (Toy(SGD), None, "Toy has no test_step"),
        (WithTest(SGD), None, "WithTest has no test_dataloader"),
        (WithTest(SGD), empty, "LightningDataModule has no test_dataloader"),
    ):
        with pytest.raises(ValueError, match=rf"test=true, but {said}\. Write one, or set"):
            experiment.require_test(module, data)
    module = WithTest(SGD)
    module.test_dataloader = lambda: loader(0, 8)
    experiment.require_test(module, None)
