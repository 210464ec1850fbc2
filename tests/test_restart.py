"""torchrun starts all workers again after one, or a machine, is gone; they resume by themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import restarted
import torch
from processes import Forked, free_port, processes_of, run_script, run_workers
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from waiting import until

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the processes of a test work; they must have ended with it.

    An agent that is forked forks its workers.
    """
    monkeypatch.setattr(subprocess_handler, "Popen", Forked)
    # For its logs torch looks for its caller in the whole stack, which takes seconds under pytest.
    monkeypatch.setattr(dynamic_rendezvous, "get_method_name", lambda depth=2: "")
    yield tmp_path
    left = processes_of(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def start(folder: Path, *command: object, how: Any = Forked, **environment: str) -> Any:
    variables = {
        "OMP_NUM_THREADS": "1",
        # Else the workers that are started again read where those before were (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **environment,
    }
    return how([*map(str, command)], env=os.environ | variables, cwd=folder)


def undisturbed(rank: int, folder: Path) -> None:
    warnings.filterwarnings("ignore", ".*there is no last checkpoint available")
    restarted.train(folder)


@pytest.fixture(scope="module")
def center(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two workers deliver that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_workers(undisturbed, folder, workers=2)
    return torch.load(folder / "center.pt", weights_only=True)


def starts(folder: Path, rank: int) -> list[tuple[int, int]]:
    """The number of workers and the step at every start of a rank."""
    lines = (folder / f"starts{rank}").read_text().splitlines()
    return [(int(world), int(step)) for world, step in map(str.split, lines)]


@pytest.mark.parametrize(
    ("who", "what", "resumed", "how"),
    [
        (0, "kill", 8, Forked),
        (1, "kill", 8, Forked),
        # It trains on until all stop together, in step 13.
        (1, "terminate", 12, subprocess.Popen),
    ],
)
def test_a_run_whose_worker_is_struck_ends_with_the_bits_of_one_that_was_not(
    who: int, what: str, resumed: int, how: Any, folder: Path, center: dict[str, Any]
) -> None:
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    agent = start(folder, *TORCHRUN, *options, restarted.__file__, folder, who, what, how=how)
    try:
        assert agent.wait(140) == 0
    finally:
        agent.kill()
        agent.wait()
    assert starts(folder, 0) == starts(folder, 1) == [(2, 0), (2, resumed)]
    found = torch.load(folder / "center.pt", weights_only=True)
    assert found.keys() == center.keys()
    assert all(torch.equal(found[key], center[key]) for key in center)


def test_a_machine_is_lost_and_the_other_goes_on_alone(folder: Path) -> None:
    port = free_port()
    patience = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    agents = [
        start(
            folder,
            *(*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
            *("--monitor-interval=0.1", "--rdzv-backend=c10d"),
            f"--rdzv-endpoint=127.0.0.1:{port}",
            f"--rdzv-conf={patience},is_host={int(node == 'stays')}",
            *(restarted.__file__, folder, "leaves", "lose_machine"),
            NODE=node,
        )
        for node in ("stays", "leaves")
    ]
    try:
        assert agents[1].wait(140) == -signal.SIGKILL
        assert agents[0].wait(140) == 0
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert starts(folder, 0) == [(2, 0), (1, 8)]
    assert (folder / "center.pt").exists()


def test_the_training_script_restarts_by_itself_and_says_so(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        *("experiment=elastic", "model=mlp", "data.batch_size=64", "trainer.max_epochs=20"),
        *("checkpoint.every_n_train_steps=7", "trainer.enable_progress_bar=false"),
    ]
    alone = [*overrides, "trainer.devices=2", f"hydra.run.dir={folder}/undisturbed"]
    run_script(TRAIN, alone, folder=folder, workers=None)

    checkpoints = folder / "struck" / "checkpoints"
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    agent = start(folder, *TORCHRUN, *options, TRAIN, *overrides, f"hydra.run.dir={folder}/struck")
    try:
        until((checkpoints / "last.ckpt").exists, 100)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)
        assert not (checkpoints / "final.ckpt").exists()
        assert agent.wait(140) == 0
    finally:
        agent.kill()
        agent.wait()
    (said,) = re.findall(
        r"^restart 1 of 1, from step (\d+); \d+ steps lost$", capfd.readouterr().out, re.M
    )
    assert int(said) % 7 == 0
    found, expected = (
        torch.load(folder / name / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
        for name in ("struck", "undisturbed")
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)
