"""The ways users start workers: by name, spawn, fork, torchrun, SLURM, LightningCLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from processes import become_slurm_task, free_port, run_workers
from toy import Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)

SCRIPT = """
import atexit, json, os, sys
from functools import partial
import torch
from toy import Toy, loader, trainer, weights

@atexit.register
def fail_in_a_group():
    if torch.distributed.is_initialized():
        os._exit(1)

if __name__ == "__main__":
    torch.set_num_threads(1)
    module = Toy(partial(torch.optim.SGD, lr=0.1))
    fitting = trainer(2, sys.argv[1], max_epochs=3)
    fitting.fit(module, loader(0, 5))
    if fitting.is_global_zero:
        w = weights(module)["w"].tolist()
        with open(sys.argv[2], "w") as file:
            json.dump({"world": fitting.world_size, "w": w}, file)
"""


def reference(rank: int) -> list[list[float]]:
    module = Toy(SGD)
    trainer(2, "easgd", max_epochs=3).fit(module, loader(0, 5))
    return weights(module)["w"].tolist()


@pytest.mark.parametrize(
    ("prefix", "strategy"),
    [
        ([], "easgd"),
        ([], "easgd_spawn"),
        ([], "easgd_fork"),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "easgd"),
    ],
    ids=["easgd", "easgd_spawn", "easgd_fork", "torchrun"],
)
def test_launchers_train_the_same_center(prefix: list[str], strategy: str, tmp_path: Path) -> None:
    script, result = tmp_path / "user.py", tmp_path / "result.json"
    script.write_text(SCRIPT)
    here = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, *prefix, str(script), strategy, str(result)],
        env=os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
        capture_output=True,
    )
    found = json.loads(result.read_text())
    assert found["world"] == 2
    assert found["w"] == run_workers(reference, workers=2)[0]


def under_slurm(rank: int, port: int) -> Any:
    become_slurm_task(rank, port)
    module, fitting = Toy(SGD), trainer(2, "easgd", max_epochs=3)
    fitting.fit(module, loader(0, 5))
    return type(fitting.strategy.cluster_environment).__name__, weights(module)["w"].tolist()


def test_slurm_environment() -> None:
    expected = run_workers(reference, workers=2)[0]
    for outcome in run_workers(under_slurm, free_port(), workers=2):
        assert outcome == ("SLURMEnvironment", expected)


def two_nodes(rank: int) -> Any:
    """A plain multi-node environment: two nodes of one device."""
    os.environ.update(NODE_RANK=str(rank), LOCAL_RANK="0")
    module, fitting = Toy(SGD), trainer(1, "easgd", num_nodes=2, max_epochs=3)
    fitting.fit(module, loader(0, 5))
    return fitting.world_size, weights(module)["w"].tolist()


def test_plain_multi_node_environment() -> None:
    expected = run_workers(reference, workers=2)[0]
    assert run_workers(two_nodes, workers=2) == [(2, expected)] * 2


class CommandLineToy(Toy):
    def __init__(self) -> None:
        super().__init__(SGD)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
def test_lightning_cli_takes_the_class_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        CommandLineToy,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", "devices": 2, "logger": False},
        args=[
            "--trainer.strategy.class_path=lightning_easgd.EASGDStrategy",
            "--trainer.strategy.init_args.tau=16",
            "--trainer.strategy.init_args.beta=0.8",
        ],
    )
    assert isinstance(cli.trainer.strategy, EASGDStrategy)
    assert cli.trainer.strategy.options.rules.period.after(0) == (16, 16)
    assert cli.trainer.strategy.options.rules.strength.at(0) == 0.8
