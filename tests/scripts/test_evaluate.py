"""scripts/evaluate.py on runs of train.py, against what is computed here by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating.holding import Held
from evaluating.recalling import recall
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from processes import run_script
from torch import Tensor, nn

SCRIPTS = Path(__file__).parents[2] / "scripts"
QUIET = ["trainer.enable_progress_bar=false"]
RUN = [
    *("trainer.devices=2", "trainer.max_epochs=2", "data.batch_size=64", "strategy.tau=5"),
    *("model=resnet", "model.width=4", "strategy.center_average=polyak", "hydra.run.dir=run"),
]
OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule


class Lit(LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)
        self.norm = torch.nn.BatchNorm1d(3)

    def test_step(self, batch, _):
        self.log("wrong", self.layer(self.norm(batch)).mean())


class Data(LightningDataModule):
    def test_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 3), batch_size=4)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of two workers lies, whose center has a running average."""
    folder = tmp_path_factory.mktemp("trained")
    run_script(SCRIPTS / "train.py", [*QUIET, *RUN], folder=folder, workers=None)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def evaluate(folder: Path, *arguments: str, code: int = 0) -> str:
    arguments = (*arguments, *QUIET, "hydra.run.dir=found")
    script = SCRIPTS / "evaluate.py"
    return run_script(script, arguments, folder=folder, workers=None, code=code)


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found" / "evaluation.json").read_text())


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


class ByHand:
    """The module and data of a run, without Lightning's Trainer."""

    def __init__(self, run: Path, **changed: Any) -> None:
        cfg = OmegaConf.load(run / "config.yaml")
        cfg.data.update(changed)
        self.net = instantiate(cfg.module).net
        self.data = instantiate(cfg.data)
        self.data.setup("fit")
        self.data.setup("test")

    def put(self, *values: Mapping[str, Tensor]) -> None:
        named = dict(self.net.named_parameters()) | dict(self.net.named_buffers())
        for name, value in (pair for each in values for pair in each.items()):
            named[name.removeprefix("net.")].data.copy_(value)

    def accuracy_and_loss(self) -> dict[str, Any]:
        self.net.eval()
        right = loss = count = 0
        for images, labels in self.data.test_dataloader():
            with torch.no_grad():
                logits = self.net(images)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        numbers = {"test/accuracy": right / count, "test/loss": loss / count}
        return pytest.approx(numbers, rel=1e-4)


def test_all_models_are_those_of_the_files(trained: Path, tmp_path: Path) -> None:
    run = trained / "run"
    printed = evaluate(tmp_path, str(run), "data.batch_size=1437")
    main = load(run / "checkpoints" / "last.ckpt")
    entry, state = main["lightning_easgd"], main["state_dict"]
    workers = [
        load(run / "checkpoints" / "last.ckpt.workers" / f"{entry['save']}-{rank}.ckpt")["weights"]
        for rank in range(2)
    ]
    workers = [each["tensors"] for each in workers]
    mean = {
        name: (value + workers[1][name]) / 2
        for name, value in workers[0].items()
        if value.is_floating_point()
    }
    assert any("running_var" in name for name in mean)
    hand, expected = ByHand(run, batch_size=1437), {}
    models: dict[str, list[Mapping[str, Tensor]]] = {
        "center": [entry["averaged"]["center"]],
        "running average": [],
        "worker 0": [workers[0]],
        "worker 1": [workers[1]],
        "mean of the workers": [mean],
    }
    for name, values in models.items():
        hand.put(state, *values)
        expected[name] = hand.accuracy_and_loss()
    hand.put(state, entry["averaged"]["center"])
    ((images, _),) = hand.data.train_dataloader()
    for layer in hand.net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
            layer.train()
    with torch.no_grad():
        hand.net(images)
    expected["center, BatchNorm recalibrated"] = hand.accuracy_and_loss()
    assert found(tmp_path)["tested"] == expected
    losses = [numbers["test/loss"] for numbers in found(tmp_path)["tested"].values()]
    assert len(set(losses)) == len(models) + 1
    assert found(tmp_path)["missing"] == {}
    assert (found(tmp_path)["step"], found(tmp_path)["batches"]) == (22, 1)
    assert f"checkpoint {run}/checkpoints/last.ckpt\n" in printed
    assert "data.batch_size = 1437, in the run it was 64" in printed
    assert "BatchNorm was recalibrated on 1 training batches" in printed


def test_what_is_missing_is_said_and_left_out(run: Path, tmp_path: Path) -> None:
    (lost,) = (run / "checkpoints" / "last.ckpt.workers").glob("*-1.ckpt")
    lost.unlink()
    printed = evaluate(tmp_path, "run/checkpoints/last.ckpt", "batches=0")
    assert [*found(tmp_path)["tested"]] == ["center", "running average", "worker 0"]
    assert [*found(tmp_path)["missing"]] == ["worker 1", "mean of the workers"]
    assert "Left out: worker 1. Because" in printed
    assert lost.name in printed


def test_the_data_are_those_that_the_run_has_stored(run: Path, tmp_path: Path) -> None:
    stored = OmegaConf.load(run / "config.yaml")
    stored.data.std = 100.0
    OmegaConf.save(stored, run / "config.yaml")
    printed = evaluate(tmp_path, "run/checkpoints/final.ckpt")
    hand = ByHand(run)
    hand.put(load(run / "checkpoints" / "final.ckpt")["state_dict"])
    assert found(tmp_path)["tested"]["model"] == hand.accuracy_and_loss()
    assert [*found(tmp_path)["tested"]] == ["model", "model, BatchNorm recalibrated"]
    assert "Left out: workers. Because the checkpoint is another strategy's" in printed


def test_a_checkpoint_of_no_run_takes_classes_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    layer = {"layer.weight": torch.tensor([[1.0, 2.0, 3.0]]), "layer.bias": torch.tensor([4.0])}
    norm = {f"norm.{name}": value for name, value in nn.BatchNorm1d(3, eps=0).state_dict().items()}
    checkpoint = {"pytorch-lightning_version": "2.6.4", "state_dict": layer | norm}
    torch.save(checkpoint, tmp_path / "epoch=1-step=2.ckpt")
    given = ["epoch=1-step=2.ckpt", "module._target_=mine.Lit", "data._target_=mine.Data"]
    printed = evaluate(tmp_path, *given)
    assert found(tmp_path)["tested"] == {"model": {"wrong": pytest.approx(10.0, rel=1e-4)}}
    assert "Left out: model, BatchNorm recalibrated. Because" in printed  # there is no such data
    assert "train_dataloader" in printed
    printed = evaluate(tmp_path, *given, "module.width=2", code=1)
    assert "error: Lit does not fit" in printed
    assert "size mismatch for layer.weight" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a checkpoint first"),
        (["batches=3", "run"], "batches=3 does not exist"),
        (["empty"], "empty has no checkpoint: none lies in"),
        (["alone.ckpt"], "alone.ckpt lies in no folder of a run"),
    ],
)
def test_what_names_no_checkpoint_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone.ckpt").touch()
    with pytest.raises(ValueError, match=said):
        recall(arguments)


def test_a_checkpoint_of_another_layout_is_refused(run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    content = load(path)
    content["lightning_easgd"]["format"] = 1
    torch.save(content, path)
    with pytest.raises(Exception, match="has layout 1, this version of lightning-easgd reads"):
        Held(str(path))


def test_the_best_checkpoint_comes_before_the_newest(run: Path) -> None:
    chosen = [recall([str(run)]).checkpoint]
    shutil.copy(run / "checkpoints" / "final.ckpt", run / "checkpoints" / "best.ckpt")
    chosen.append(recall([str(run)]).checkpoint)
    for name in ("best", "last"):
        (run / "checkpoints" / f"{name}.ckpt").unlink()
    chosen.append(recall([str(run)]).checkpoint)
    assert [Path(path).name for path in chosen] == ["last.ckpt", "best.ckpt", "final.ckpt"]


@pytest.fixture
def hydra_folder(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.mkdir()
    folder = tmp_path / "run" / ".hydra"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "x.ckpt").touch()
    sources = [{"path": str(own), "provider": "command-line"}, {"path": "/c", "provider": "main"}]
    OmegaConf.save(
        OmegaConf.create({"hydra": {"runtime": {"config_sources": sources}}}), folder / "hydra.yaml"
    )
    return folder


def test_the_command_line_of_the_run_comes_first(hydra_folder: Path) -> None:
    recorded = ["model=gpt", "data=text", "launcher=joblib", "ckpt_path=old.ckpt"]
    OmegaConf.save(OmegaConf.create(recorded), hydra_folder / "overrides.yaml")
    path = hydra_folder.parent / "x.ckpt"
    run = recall([str(path), "data.batch_size=2"])
    flags = ["--config-dir", str(hydra_folder.parents[1] / "own")]
    typed = ["model=gpt", "data=text", "data.batch_size=2", f"ckpt_path={path}"]
    assert run.arguments == [*flags, *typed]
    with initialize_config_dir(str(SCRIPTS.parent / "conf"), version_base="1.3"):
        cfg = compose("evaluate", [*typed, "output_dir=."])
    assert cfg.module._target_ == "lightning_easgd.workloads.language.LanguageModel"
    assert run.configuration(cfg).trainer.devices == 1


def test_what_only_the_environment_knows_is_not_said(
    hydra_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    run = recall([str(hydra_folder.parent / "x.ckpt"), "data=other"])
    (hydra_folder.parent / "config.yaml").write_text("data: {x: 1}")
    composed = OmegaConf.create({"data": {"x": 2, "token": "${oc.env:TOKEN}"}})
    assert set(run.notes(composed)) == {
        "data.x = 2, in the run it was 1",
        "data.token = ${oc.env:TOKEN}, in the run it was not set",
    }
