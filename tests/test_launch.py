"""The ways users start workers: by name, spawn, fork, torchrun, SLURM, LightningCLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import SGD, require_one_center
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningCLI
from processes import become_slurm_task, free_port, processes_of, run_script, run_workers
from toy import Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy

SCRIPT = """
import atexit, json, os, sys
from functools import partial
import torch
from launched import fit_at_a_server
from lightning_easgd import EASGDStrategy
from lightning_easgd.algorithms import EASGD
from toy import Toy, loader, trainer, weights

@atexit.register
def fail_in_a_group():
    if torch.distributed.is_initialized():
        os._exit(1)

class Said(Toy):
    def __init__(self, name):
        super().__init__(partial(torch.optim.SGD, lr=0.1))
        self.name = name

    def teardown(self, stage):
        if self.global_rank == 0:
            with open(f"{self.name} in worker 0", "w") as file:
                json.dump(vars(self.trainer.strategy.telemetry), file)

class Ordinary:
    pass

class Own(EASGD):
    def __init__(self, size, start_method):
        super().__init__()
        self.size, self.helper = size, Ordinary()
        self.partly = partial(max, self.helper)
        if start_method == "popen":  # a lambda cannot be sent to a process that is spawned
            self.weigh = lambda x: x

def named(name):
    start_method = name.removeprefix("own_")
    if name == start_method:
        return name
    return EASGDStrategy(algorithm=Own(1, start_method), start_method=start_method)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        if name == "easgd_async":
            found = fit_at_a_server(int(os.environ["RANK"]))
            with open(f"{name} {found['rank']}", "w") as file:
                json.dump(found, file)
            continue
        module = Said(name)
        fitting = trainer(2, named(name), max_epochs=3)
        fitting.fit(module, loader(0, 5))
        if fitting.is_global_zero:
            w, telemetry = weights(module)["w"].tolist(), vars(fitting.strategy.telemetry)
            with open(f"{name} after fit", "w") as file:
                json.dump({"world": fitting.world_size, "w": w, "telemetry": telemetry}, file)
"""


def reference(rank: int) -> list[list[float]]:
    module = Toy(SGD)
    trainer(2, "easgd", max_epochs=3).fit(module, loader(0, 5))
    return weights(module)["w"].tolist()


def run_fresh(script: Path, *arguments: str, prefix: Sequence[str] = ()) -> str:
    ended = subprocess.run(
        [sys.executable, *prefix, str(script), *arguments],
        cwd=script.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=170,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return ended.stdout


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "user.py"
    path.write_text(SCRIPT)
    return path


def test_a_launcher_trains_the_same_center_and_brings_back_worker_0s_telemetry(
    script: Path,
) -> None:
    """Also under a rule that holds ordinary objects, which is the same on all workers."""
    run_fresh(script, "easgd", "own_popen")
    require_centers_and_telemetry(script.parent, "easgd", "own_popen")


def test_torchrun_trains_the_same_center_also_at_a_server(script: Path) -> None:
    names = ["easgd", *(["easgd_async"] if find_spec("grpc") else [])]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run_fresh(script, *names, prefix=torchrun)
    require_centers_and_telemetry(script.parent, "easgd")
    if "easgd_async" in names:
        paths = [script.parent / f"easgd_async {rank}" for rank in (0, 1)]
        require_one_center([json.loads(path.read_text()) for path in paths])
    assert not processes_of(script.parent)


def test_spawned_workers_train_the_same_center_and_bring_back_worker_0s_telemetry(
    script: Path,
) -> None:
    """Under a rule that holds ordinary objects, which is the same on all workers."""
    run_script(script, ["own_spawn"], folder=script.parent, workers=None)
    require_centers_and_telemetry(script.parent, "own_spawn")


def require_centers_and_telemetry(folder: Path, *names: str) -> None:
    expected = run_workers(reference, workers=2)[0]
    for name in names:
        inside, after = (
            json.loads((folder / f"{name} {when}").read_text())
            for when in ("in worker 0", "after fit")
        )
        assert after["world"] == 2
        assert after["w"] == expected
        telemetry = after["telemetry"]
        assert telemetry["steps"] == 15
        assert telemetry["exchanges"] == 2  # one at step 10, and the last
        assert len(telemetry["worker_wait_seconds"]) == 2
        assert telemetry == inside


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


AUTO = '{"class_path": "lightning_easgd.Auto", "init_args": {"min": 2, "max": 40}}'


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
@pytest.mark.parametrize(
    ("tau", "said"),
    [("16", "16"), ("auto", "auto, from 1 to 64"), (AUTO, "auto, from 2 to 40")],
)
def test_lightning_cli_takes_the_class_path(
    tau: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        CommandLineToy,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", "devices": 2, "logger": False},
        args=[
            "--trainer.strategy.class_path=lightning_easgd.EASGDStrategy",
            f"--trainer.strategy.init_args.tau={tau}",
            "--trainer.strategy.init_args.beta=0.8",
        ],
    )
    assert isinstance(cli.trainer.strategy, EASGDStrategy)
    assert str(cli.trainer.strategy.options.rules.period) == said
    assert cli.trainer.strategy.options.rules.strength.at(0) == 0.8


INTERACTIVE = """
import sys
import lightning_easgd
from lightning.pytorch import Trainer
from lightning_easgd import DiLoCo, EASGDStrategy

def said(strategy):
    try:
        Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
    except Exception as error:
        return str(error)
    return "no error"

for name in ["easgd", "mvadownpour", "slowmo_spawn", "easgd_notebook", "adownpour_async_fork"]:
    print(name, said(name))
print("local", said(EASGDStrategy(center="local")))
print("object", said(EASGDStrategy(algorithm=DiLoCo(outer_lr=0.1), tau=4)))
"""


def test_a_notebook_is_told_the_name_that_works_there(script: Path) -> None:
    """And forked workers of two such names train the same center, and bring back telemetry."""
    script.write_text(INTERACTIVE + SCRIPT)
    printed = run_fresh(script, "easgd_notebook", "easgd_fork", prefix=("-i",))
    said = dict(line.split(" ", 1) for line in printed.splitlines() if " " in line)
    assert "Trainer(strategy='easgd_notebook')" in said["easgd"]
    assert "Trainer(strategy='mvadownpour_notebook')" in said["mvadownpour"]
    assert "Trainer(strategy='slowmo_notebook')" in said["slowmo_spawn"]
    assert "start_method='fork'" in said["object"]
    assert "ddp" not in printed
    assert "Trainer(strategy='easgd_async_notebook')" in said["local"]
    assert said["easgd_notebook"] == said["adownpour_async_fork"] == "no error"
    require_centers_and_telemetry(script.parent, "easgd_notebook", "easgd_fork")


OTHER_PACKAGE = """
import sys
for name in sys.argv[1:]:
    __import__(name)
import lightning_easgd
assert sys.argv[1:] or "pytorch_lightning" not in sys.modules
import pytorch_lightning

for strategy in ["easgd", "local_sgd_spawn", lightning_easgd.EASGDStrategy(tau=4), "ddp"]:
    try:
        pytorch_lightning.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
        print("no error")
    except Exception as error:
        print(error)
"""


@pytest.mark.parametrize("before", [[], ["pytorch_lightning"]])
def test_the_other_package_says_which_import_to_change(before: list[str], tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(OTHER_PACKAGE)
    if before or "pytorch_lightning" in sys.modules:
        printed = run_fresh(script, *before)
    else:  # this package was imported before the other one here, too
        printed = run_script(script, [], folder=tmp_path, workers=None)
    *refused, ddp = [line for line in printed.splitlines() if not line.startswith("GPU")]
    assert len(refused) == 3
    assert "Trainer(strategy=EASGDStrategy(...)) of pytorch_lightning" in refused[-1]
    for message in refused:
        assert "invalid strategy" not in message
        assert "`import lightning.pytorch as pl` instead of `import pytorch_lightning" in message
    assert ddp == "no error"


def test_what_a_test_starts_imports_this_tree(tmp_path: Path) -> None:
    code = "from importlib.util import find_spec; print(find_spec('lightning_easgd').origin)"
    ended = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(ended.stdout.strip()).is_relative_to(Path(__file__).parents[1])


class Numbered(CPUAccelerator):
    """One whose devices are what it is given, as those of other libraries are."""

    device: Any = 0

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[Any]:
        return [Numbered.device] * int(devices)


@pytest.mark.parametrize("device", [0, "npu:0", "cpu", None, torch.device("meta")], ids=repr)
def test_an_accelerator_without_torch_devices_is_refused(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Numbered, "device", device)
    named = "meta" if isinstance(device, torch.device) else repr(device)
    with pytest.raises(MisconfigurationException, match=named) as raised:
        trainer(2, "easgd", accelerator=Numbered())
    assert "Accelerator of your own must make torch.device objects" in str(raised.value)
