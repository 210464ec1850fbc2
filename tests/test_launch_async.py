"""Workers at a local server, started by SLURM on one node, and refused on several.

Those that torchrun starts are in test_launch.py.
"""

from __future__ import annotations

import os
import re
from typing import Any
from unittest.mock import patch

import pytest
from launched import SGD, fit_at_a_server, require_one_center
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.environments import SLURMEnvironment
from processes import become_slurm_task, free_port, run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")

pytestmark = pytest.mark.timeout(170)


def fit_by_slurm(rank: int, port: int) -> dict[str, Any]:
    become_slurm_task(rank, port)
    return fit_at_a_server(rank, plugins=[SLURMEnvironment(auto_requeue=False)])


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
