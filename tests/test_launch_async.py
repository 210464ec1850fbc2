"""Workers at a local server, started by torchrun and SLURM on one node, and refused on several."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.environments import SLURMEnvironment
from processes import become_slurm_task, free_port, processes_of, run_workers
from toy import Toy, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")

pytestmark = pytest.mark.timeout(170)

SGD = partial(torch.optim.SGD, lr=0.1)


def fit(rank: int, **options: Any) -> dict[str, Any]:
    module = Toy(SGD)
    fitting = trainer(2, "easgd_async", max_epochs=3, **options)
    fitting.fit(module, loader(rank, 5 + rank))
    telemetry = fitting.strategy.telemetry
    return {
        "rank": fitting.global_rank,
        "w": weights(module)["w"].tolist(),
        "steps": fitting.global_step,
        "added": telemetry.differences_added,
        "alpha": telemetry.alpha,
    }


def require_one_center(found: list[dict[str, Any]]) -> None:
    assert [each["rank"] for each in found] == [0, 1]
    assert found[0]["w"] == found[1]["w"] != initial_weights()["w"].tolist()
    assert [each["steps"] for each in found] == [15, 18]
    assert [each["added"] for each in found] == [2, 2]  # at 10, and the last
    assert [each["alpha"] for each in found] == [0.45, 0.45]


SCRIPT = """
import json, os, torch
from test_launch_async import fit

torch.set_num_threads(1)
found = fit(int(os.environ["RANK"]))
with open(f"worker {found['rank']}", "w") as file:
    json.dump(found, file)
"""


def test_torchrun_trains_one_center_at_a_server(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    paths = [os.environ["PYTHONPATH"], str(Path(__file__).parent)]
    subprocess.run(
        [sys.executable, *torchrun, str(script)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
        timeout=150,
    )
    require_one_center([json.loads((tmp_path / f"worker {rank}").read_text()) for rank in (0, 1)])
    assert not processes_of(tmp_path)


def fit_by_slurm(rank: int, port: int) -> dict[str, Any]:
    become_slurm_task(rank, port)
    return fit(rank, plugins=[SLURMEnvironment(auto_requeue=False)])


def test_slurms_tasks_train_one_center_at_a_server() -> None:
    require_one_center(run_workers(fit_by_slurm, free_port(), workers=2, timeout=100))


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("strategy", ["downpour_async", EASGDStrategy])
def test_a_local_center_is_refused_on_several_nodes(node: int, strategy: Any) -> None:
    here = {"NODE_RANK": f"{node}", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if not isinstance(strategy, str):
        strategy = strategy(center="local")
    said = "here on 2 nodes, lies behind a server that only workers of the same machine reach. Run"
    with (
        patch.dict(os.environ, here),
        patch.object(rank_zero_only, "rank", 0),  # put back: Lightning sets it, here to 1
        patch("lightning_easgd.strategy.at_server.LocalServer", side_effect=AssertionError),
        pytest.raises(MisconfigurationException, match=re.escape(said)),
    ):
        trainer(1, strategy, num_nodes=2).fit(Toy(SGD), loader(0, 2))
