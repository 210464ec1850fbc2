"""Modules, data and callbacks of a user's own, as somebody new to the scripts would type them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from shutil import copytree

import plugging
import pytest
import torch
from plugging import find_own_code, flags_first, replace_whole
from processes import run_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
TEMPLATE = Path(__file__).parents[2] / "docs" / "template"

MY = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def rows(number):
    x = torch.randn(number, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 16)


class Data(pl.LightningDataModule):
    def __init__(self, number=64):
        super().__init__()
        self.number = number

    def train_dataloader(self):
        return rows(self.number)

    val_dataloader = test_dataloader = train_dataloader


class Net(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


class Lit(pl.LightningModule):
    def __init__(self, width=8, optimizer=None):
        super().__init__()
        self.layers = Net(width)
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        make = self.make or (lambda parameters: torch.optim.Adam(parameters, 1e-2))
        optimizer = make(self.parameters())
        print("optimizer:", type(optimizer).__name__, optimizer.param_groups[0]["lr"])
        return optimizer


class WithLoaders(Lit):
    def train_dataloader(self):
        return rows(64)

    test_dataloader = train_dataloader


class Said(pl.Callback):
    def __init__(self, word):
        self.word = word

    def on_fit_start(self, trainer, module):
        print("the callback said", self.word)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user types: their code, and files for the groups."""
    (tmp_path / "my.py").write_text(MY)
    for group, text in (
        ("module", "_target_: my.Lit\nwidth: 5\n"),
        ("data", "_target_: my.Data\nnumber: 32\n"),
    ):
        (tmp_path / "files" / group).mkdir(parents=True)
        (tmp_path / "files" / group / "mine.yaml").write_text(text)
    return tmp_path


SHORT = ["trainer.devices=2", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]


def train(folder: Path, *arguments: str) -> tuple[str, dict[str, torch.Tensor], int]:
    """What is printed, the weights that are delivered, and the steps; as under torchrun."""
    options = [*arguments, *SHORT, "logger=none", "hydra.run.dir=run"]
    printed = run_script(SCRIPT, options, folder=folder, workers=2)
    return printed, *delivered(folder)


def delivered(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    weights = torch.load(folder / "run" / "checkpoints" / "final.ckpt", weights_only=True)
    steps = json.loads((folder / "run" / "report.json").read_text())["steps"]
    return weights["state_dict"], steps


def test_a_module_and_data_by_their_classes_with_arguments(folder: Path) -> None:
    callback = ["callbacks.mine._target_=my.Said", "callbacks.mine.word=hello"]
    own = ["module._target_=my.Lit", "module.width=7", "data._target_=my.Data", "data.number=96"]
    options = [*own, *callback, *SHORT, "hydra.run.dir=run"]
    printed = run_script(SCRIPT, options, folder=folder, workers=None)
    weights, steps = delivered(folder)
    assert weights["layers.0.weight"].shape == (7, 4)
    assert steps == 96 // 2 // 16
    assert "the callback said hello" in printed


def test_files_of_their_own_outside_the_repository(folder: Path) -> None:
    _, weights, steps = train(folder, "--config-dir", "files", "module=mine", "data=mine")
    assert weights["layers.0.weight"].shape == (5, 4)
    assert steps == 1


def test_a_network_of_their_own_in_the_classifier(folder: Path) -> None:
    own = ["model._target_=my.Net", "model.width=6", "data._target_=my.Data"]
    _, weights, _ = train(folder, *own, "module.num_classes=2")
    assert weights["net.0.weight"].shape == (6, 4)


def test_a_module_that_brings_its_loaders(folder: Path) -> None:
    _, weights, steps = train(folder, "module._target_=my.WithLoaders", "data=none")
    assert weights["layers.0.weight"].shape == (8, 4)
    assert steps == 2


def test_an_optimizer_is_handed_to_a_module_of_their_own(folder: Path) -> None:
    own = ["module._target_=my.Lit", "data._target_=my.Data", "+module.optimizer=${optimizer}"]
    own += ["+callbacks=[{_target_: my.Said, word: listed}]"]
    printed, *_ = train(folder, *own, "optimizer._target_=torch.optim.RMSprop", "optimizer.lr=0.25")
    assert "optimizer: RMSprop 0.25" in printed
    assert "the callback said listed" in printed


@pytest.mark.parametrize(("name", "least"), [("tabular", 0.9), ("transformer", 0.8)])
def test_a_template_that_is_copied_trains(name: str, least: float, tmp_path: Path) -> None:
    copytree(TEMPLATE / name, tmp_path / "mine")
    quiet = ["trainer.enable_progress_bar=false", "hydra.run.dir=run"]
    mine = ["--config-dir", "mine", "experiment=mine", *quiet]
    run_script(SCRIPT, mine, folder=tmp_path, workers=None)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["tested"]["test/accuracy"] > least
    assert report["logged"].keys() >= {"val/loss", "val/accuracy", "train/loss"}


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        ([], []),
        (["tau=4"], []),
        (["--config-dir", "files", "tau=4"], ["files"]),
        (["tau=4", "--config-dir=files"], ["files"]),
        (["-cd", "files"], ["files"]),
    ],
)
def test_own_code_is_found_in_its_folders_by_the_workers_too(
    arguments: list[str], folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["scripts", "site"])
    monkeypatch.setenv("PYTHONPATH", "given")
    find_own_code(arguments)
    found = [str(tmp_path / folder) for folder in folders] + [str(tmp_path)]
    assert sys.path == ["scripts", *found, "site"]
    scripts = str(Path(plugging.__file__).parent)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [scripts, *found, "given"]


def test_a_class_replaces_another_with_all_its_arguments() -> None:
    typed = ["module.width=3", "tau=4", "module._target_=my.Lit", "strategy.beta=0.5"]
    assert replace_whole(typed) == [
        *("module=own", "++module.width=3", "tau=4", "++module._target_=my.Lit"),
        "strategy.beta=0.5",
    ]
    rule = ["strategy.algorithm._target_=my.Rule", "strategy.algorithm.pull=1", "strategy=diloco"]
    assert replace_whole(rule) == [
        "++strategy.algorithm=null",
        "++strategy.algorithm._target_=my.Rule",
        "++strategy.algorithm.pull=1",
        "strategy=diloco",
    ]
    listed = "[{_target_: my.Said, word: hi}]"
    assert replace_whole([f"+callbacks={listed}"]) == [f"+trainer.callbacks={listed}"]
    assert replace_whole(["callbacks=[lr_monitor]"]) == ["callbacks=[lr_monitor]"]
    assert replace_whole(["data=own", "data._target_=a.B"]) == ["data=own", "++data._target_=a.B"]
    assert replace_whole(["trainer._target_=my.Trainer"]) == ["trainer._target_=my.Trainer"]


def test_flags_may_stand_between_what_is_set() -> None:
    typed = ["seed=1", "--config-dir", "a=b", "-m", "experiment=mine", "--config-name=x", "~logger"]
    flags = ["--config-dir", "a=b", "-m", "--config-name=x"]
    assert flags_first(typed) == [*flags, "seed=1", "experiment=mine", "~logger"]
    assert flags_first(["seed=1", "--info", "tau=1"]) == ["seed=1", "--info", "tau=1"]
