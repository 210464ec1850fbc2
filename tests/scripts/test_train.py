"""scripts/train.py as users run it: from another working folder, and by itself or by torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import answering
import pytest
import torch
from hydra import compose, initialize_config_dir
from objective import Sought, objective
from plugging import replace_whole
from processes import run_script
from train import draw_curves

from lightning_easgd.workloads.report import Report

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SHORT = ["data.batch_size=64", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]


def train(folder: Path, *overrides: str, code: int = 0, multirun: bool = False) -> str:
    """Run the script in ``folder`` as a user does; what it printed."""
    arguments = [*(["-m"] if multirun else []), *SHORT, *overrides]
    return run_script(SCRIPT, arguments, folder=folder, workers=None, code=code)


def train_as_workers(folder: Path, *overrides: str, workers: int = 1, code: int = 0) -> str:
    """As :func:`train`, but as torchrun would."""
    arguments = [*SHORT, f"trainer.devices={workers}", *overrides]
    return run_script(SCRIPT, arguments, folder=folder, workers=workers, code=code)


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_reports_accuracy_bytes_waits_and_the_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "it's a run, a=b"
    validated = "trainer.check_val_every_n_epoch=1"
    printed = train(
        tmp_path, "trainer.devices=2", "strategy.tau=5", validated, f'hydra.run.dir="{run}"'
    )
    found = report(run)
    assert found["workers"] == 2
    assert found["steps"] == 1437 // 2 // 64
    assert found["exchanges"] == 3  # at steps 5, 10, and the last
    for label in (
        f"test/accuracy {found['tested']['test/accuracy']:.5g}, of the center",
        "strategy easgd, tau=5, beta=0.9, lr=0.3",
        "model Classifier of CNN, 87,178 parameters",
        "data Digits, seed 42",
        "workers 2, 11 steps each",
        "exchanges 3",
        "sent by each worker 1.05 MB, 27.3 % of DDP's 3.84 MB",  # in 3 of 11 steps
        " waited ",
        str(run / "checkpoints" / "final.ckpt"),
    ):
        assert label in " ".join(printed.split())  # how wide names are is by chance
    assert "litlogger" not in printed
    assert not (run / "train.log").exists()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "easgd/wait_seconds" in (run / "csv" / "version_0" / "metrics.csv").read_text()
    state = torch.load(run / "checkpoints" / "final.ckpt", weights_only=True)
    assert any(key.startswith("net.") for key in state["state_dict"])
    checkpoint = f'ckpt_path="{run}/checkpoints/final.ckpt"'
    tested = train_as_workers(tmp_path, "train=false", checkpoint, "hydra.run.dir=tested")
    assert report(tmp_path / "tested")["tested"] == pytest.approx(found["tested"])
    assert set(found["tested"]) == {"test/loss", "test/accuracy"}
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(found["logged"])
    assert f"checkpoint     {run}/checkpoints/final.ckpt" in tested


def test_groups_are_reported_with_what_leaves_them() -> None:
    sent = {"exchanges": 3, "bytes_sent": 5_000_000, "ddp_bytes_sent": 10_000_000}
    table = Report(strategy="easgd", workers=4, bytes_inside=4_000_000, **sent).table()
    assert "sent by worker 0            5.00 MB, 50.0 % of DDP's 10.00 MB" in table
    assert "  of that, to other groups  1.00 MB, 10.0 % of DDP's 10.00 MB" in table


def test_small_parameters_are_reported_by_themselves() -> None:
    sent = {"exchanges": 3, "bytes_sent": 5_000_000, "ddp_bytes_sent": 10_000_000}
    table = Report(
        strategy="easgd", workers=2, exchanges_often=24, bytes_often=400_000, **sent
    ).table()
    assert "exchanges                        3, and 24 of small parameters" in table
    assert "sent by each worker              5.00 MB, 50.0 % of DDP's 10.00 MB" in table
    assert "  of that, for small parameters  0.40 MB, 4.0 % of DDP's 10.00 MB" in table


def test_how_stale_differences_were_is_reported_where_a_server_has_the_center() -> None:
    table = Report(strategy="easgd_async", workers=2, exchanges=3, staleness=1.25).table()
    assert "staleness of worker 0  the center moved 1.2 times between get and add" in table
    assert "staleness" not in Report(strategy="easgd", workers=2, exchanges=3).table()


def test_a_picture_that_cannot_be_drawn_is_said_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,no number\n")
    draw_curves(tmp_path)
    assert f"{tmp_path}/curves.png was not drawn: ValueError(" in capsys.readouterr().err


def test_the_command_of_the_readme_reaches_97_percent_on_the_digits(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT)]  # nothing else, as in README
    subprocess.run(command, cwd=tmp_path, check=True, timeout=170, capture_output=True)
    (folder,) = tmp_path.glob("outputs/*/*/")
    found = report(folder)
    assert found["workers"] == 4
    assert found["tested"]["test/accuracy"] >= 0.97


def test_a_sweeper_gets_the_number_that_it_asked_for() -> None:
    reported = {"logged": {"val/loss": 0.25}, "tested": {"test/loss": 0.5}}
    for name, value in (("val/loss", 0.25), ("test/loss", 0.5), (None, None)):
        assert objective(name, reported) == value
    with pytest.raises(ValueError, match=r"objective=loss was .* Allowed are test/loss, val/loss"):
        objective("loss", reported)


def test_a_number_that_is_not_there_is_an_error_that_lists_what_is(tmp_path: Path) -> None:
    overrides = ["model=mlp", "strategy=single", "objective=accuracy"]
    printed = train(tmp_path, *overrides, code=1)
    assert "Allowed are test/accuracy, test/loss, train/accuracy, train/loss" in printed


def test_of_a_number_that_only_the_test_can_log_users_are_warned() -> None:
    trainer: Any = SimpleNamespace(enable_validation=False, callback_metrics={"val/loss": 1.0})
    Sought("test/loss", tested=True).on_train_epoch_end(trainer, trainer)
    with pytest.warns(UserWarning, match=r"objective=loss was not .* Or it is of the test"):
        Sought("loss", tested=True).on_train_epoch_end(trainer, trainer)


@pytest.mark.parametrize(("name", "more"), [("val/acuracy", []), ("accuracy", ["test=false"])])
def test_a_number_that_will_not_be_there_ends_training_after_an_epoch(
    tmp_path: Path, name: str, more: list[str]
) -> None:
    long = ["trainer.max_epochs=100000", "trainer.check_val_every_n_epoch=1"]
    overrides = ["model=mlp", "trainer.devices=2", *long, f"objective={name}", *more]
    said = train(tmp_path, *overrides, code=1)
    assert f"objective={name} was not logged in the first epoch that was validated." in said
    assert "Allowed are train/accuracy, train/loss, val/accuracy, val/loss." in said


def test_a_seed_repeats_exactly_and_resuming_too(tmp_path: Path) -> None:
    common = ["strategy=eamsgd", "strategy.tau=7", "seed=3", "schedule=constant", "logger=none"]
    two_epochs = "trainer.max_epochs=2"
    train_as_workers(tmp_path, *common, "hydra.run.dir=first", workers=2)
    resume = f"ckpt_path={tmp_path}/first/checkpoints/last.ckpt"
    for name, more in (("resumed", [resume]), ("straight", []), ("again", [])):
        overrides = [*common, *more, two_epochs, f"hydra.run.dir={name}"]
        train_as_workers(tmp_path, *overrides, workers=2)
    resumed, straight, again = (
        torch.load(tmp_path / name / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
        for name in ("resumed", "straight", "again")
    )
    for key, value in straight.items():
        assert torch.equal(value, again[key]), key
        assert torch.equal(value, resumed[key]), key
    assert report(tmp_path / "resumed")["bytes_sent"] == report(tmp_path / "straight")["bytes_sent"]


def test_a_gpt_learns_bytes_of_the_standard_library(tmp_path: Path) -> None:
    text = ["model=gpt", "data=text", "data.max_bytes=60000", "data.batch_size=16", "logger=none"]
    train(tmp_path, *text, "strategy=diloco", "trainer.devices=2", "hydra.run.dir=run")
    found = report(tmp_path / "run")
    assert found["steps"] == 54_000 // 64 // 2 // 16
    assert 1 < found["tested"]["test/bits_per_byte"] < 6.5
    assert 1 < found["logged"]["val/bits_per_byte"] < 6.5


def test_sweeps_over_anything_leave_each_job_its_folder(tmp_path: Path) -> None:
    overrides = ["trainer.devices=2,1", "model=mlp", "logger=none", "hydra.sweep.dir=sweep"]
    train(tmp_path, *overrides, multirun=True)
    folders = [tmp_path / "sweep" / str(job) for job in (0, 1)]
    assert [report(folder)["workers"] for folder in folders] == [2, 1]
    assert not [path for folder in folders for path in folder.rglob("metrics.csv")]


OTHERS = {"comparison", "contender", "preset", "scale", "sweep"}
"""Groups of other scripts."""


def test_help_lists_the_usual_commands_and_its_own_choices_with_their_comments(
    tmp_path: Path,
) -> None:
    printed = train(tmp_path, "--help")
    assert "\nlogger=csv\n  csv          Metrics as a table, " in printed
    assert "\n  paper_easgd        The paper's CIFAR-10 experiment with EASGD" in printed
    for path in (SCRIPT.parents[1] / "conf").glob("*/*.yaml"):
        listed = f"\n  {path.stem} " in printed
        assert listed or path.parent.name in OTHERS, path
    assert "contender" not in printed
    commands = [line for line in printed.splitlines() if line.startswith("  python ")]
    assert len(commands) == 5
    with initialize_config_dir(str(SCRIPT.parents[1] / "conf"), version_base="1.3"):
        for command in commands:
            typed = command.strip().split("  ")[0].split()[2:]
            if "-m" not in typed:
                compose("train", replace_whole(typed))


def test_baselines_and_workers_started_by_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its variables; torchrun itself starts the script in test_restart.py."""
    small = ["model=mlp", "logger=none"]
    train_as_workers(tmp_path, "strategy=single", *small, "hydra.run.dir=single")
    assert report(tmp_path / "single")["workers"] == 1
    variables = {"TORCHELASTIC_RUN_ID": "7", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    train_as_workers(tmp_path, "strategy=ddp", *small, "hydra.run.dir=ddp", workers=2)
    found = report(tmp_path / "ddp")
    assert found["strategy"] == "ddp"
    assert found["bytes_sent"] == found["parameters"] * 4 * found["steps"]  # 2 (p - 1) / p is 1


MY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        raise LookupError("no picture there")
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["strategy=easgdd"],
            "strategy=easgdd is not possible: there is no such file. Did you mean strategy=easgd?",
        ),
        (["hydra/launcher=x"], "hydra/launcher=x is not possible: Hydra has no such plugin here."),
        (["strategy.tua=4"], "there is no key strategy.tua. Did you mean strategy.tau?"),
        (["debg=fast"], "there is no key debg. Did you mean debug?"),
        (
            ["data=mnist", "data.image_siz=4"],
            "there is no key data.image_siz. Did you mean data.image_size?",
        ),
        (["strategy.tau=[1"], "strategy.tau=[1 cannot be read: no viable alternative"),
        (["train=false"], "train=false got nothing to test. Set ckpt_path=PATH, or test=false"),
        (["strategy.beta=3"], "beta=3 is not allowed. Allowed: a number in (0, 2)"),
        (["+strategy.tua=4"], "EASGDStrategy got an unknown argument tua=4"),
        (["strategy.beta=0.9", "strategy.rho=1"], "Got beta=0.9, rho=1: at most one of"),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu, trainer.devices=1, "),
        (["trainer.devices=x"], "trainer.accelerator=cpu, trainer.devices=x, "),
        (["data=mnist", "data.root=nowhere"], "MNIST is not on disk; searched were nowhere"),
        (["seed=null"], "seed=None is not allowed. Allowed: a whole number from 0 to 4294967295"),
        (["seed=-1"], "seed=-1 is not allowed. Allowed: a whole number from 0 to 4294967295"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt does not exist."),
        (
            ["module._target_=my.Ne", "data._target_=my.Net"],
            "module._target_=my.Ne: there is no such class",
        ),
        (["model._target_=bad.Net"], "model._target_=bad.Net cannot be imported: NameError("),
        (["model._target_=my.Net"], "LookupError: no picture there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "my.py").write_text(MY)
    (tmp_path / "bad.py").write_text("undefined")
    (line,) = train(tmp_path, "trainer.devices=1", *overrides, code=1).strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_the_traceback_is_in_the_folder_or_shown_to_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["strategy.beta=3", "trainer.devices=2", "hydra.run.dir=run"]
    train(tmp_path, *overrides, code=1)
    assert "Traceback" in (tmp_path / "run" / "error.log").read_text()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(answering, "FULL", True)
    assert "Traceback" in train(tmp_path, *overrides, code=1)


def test_restarts_that_would_hang_are_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    said = train_as_workers(tmp_path, workers=2, code=1)
    assert said.count("error:") == 1
    assert "error: torchrun --max-restarts=3 would hang: " in said
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said


@pytest.mark.parametrize(
    ("overrides", "workers", "message"),
    [
        (["strategy=single"], 2, "2 were started. Set trainer.devices=1"),
        (["train=false", "ckpt_path=last"], 1, "Set ckpt_path to a checkpoint that exists"),
        (["strategy.beta=3"], 2, "error: beta=3 is not allowed."),
        (["strategy.bta=3"], 2, "error: there is no key strategy.bta"),
    ],
    ids=str,
)
def test_workers_of_a_launcher_say_it_once(
    tmp_path: Path, overrides: list[str], workers: int, message: str
) -> None:
    printed = train_as_workers(tmp_path, *overrides, "hydra.run.dir=run", workers=workers, code=1)
    assert printed.count(message) == 1
    if (log := tmp_path / "run" / "worker1.log").exists():
        assert message in log.read_text()
