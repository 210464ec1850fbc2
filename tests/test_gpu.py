"""The strategy on a GPU: the same numbers as on the CPU, mixed precision, silent steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import free_port

needs_gpu = pytest.mark.usefixtures("gpus")

SCRIPT = """
import json, sys
from functools import partial
import torch
from toy import Toy, loader, trainer, weights
from lightning_easgd import EASGDStrategy

accelerator, precision, backend, devices, result = sys.argv[1:]
dtype = torch.float64 if precision == "64-true" else torch.float32
module = Toy(partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), dtype=dtype)
strategy = EASGDStrategy(tau=2, process_group_backend=backend)
fitting = trainer(int(devices), strategy, accelerator=accelerator, precision=precision)
fitting.fit(module, loader(fitting.global_rank, 9, dtype))
if fitting.is_global_zero:
    found = {k: v.tolist() for k, v in weights(module).items()}
    json.dump({"weights": found, "exchanges": strategy.telemetry.exchanges}, open(result, "w"))
"""


def fit(folder: Path, accelerator: str, precision: str, backend: str, devices: int) -> dict:
    script, result = folder / "user.py", folder / f"{accelerator}.json"
    script.write_text(SCRIPT)
    port = {"MASTER_PORT": str(free_port())}
    arguments = [accelerator, precision, backend, str(devices), str(result)]
    subprocess.run(
        [sys.executable, str(script), *arguments], env=os.environ | port, check=True, timeout=170
    )
    return json.loads(result.read_text())


def assert_alike(one: dict, two: dict, tolerance: float) -> None:
    assert one["exchanges"] == two["exchanges"] == 5
    for key, value in one["weights"].items():
        np.testing.assert_allclose(value, two["weights"][key], atol=tolerance)


@needs_gpu
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("64-true", 1e-9), ("bf16-mixed", 3e-2), ("16-mixed", 3e-2)]
)
def test_one_gpu_reaches_what_the_cpu_does(
    backend: str, precision: str, tolerance: float, tmp_path: Path
) -> None:
    exact = precision if precision == "64-true" else "32-true"
    on_cpu = fit(tmp_path, "cpu", exact, "gloo", 1)
    assert_alike(fit(tmp_path, "gpu", precision, backend, 1), on_cpu, tolerance)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_gpus_reach_what_two_cpu_workers_do(backend: str, tmp_path: Path, gpus: int) -> None:
    if gpus < 2:
        pytest.skip("needs 2 CUDA GPUs for nccl: run pytest on a machine with two")
    on_cpu = fit(tmp_path, "cpu", "64-true", "gloo", 2)
    assert_alike(fit(tmp_path, "gpu", "64-true", backend, 2), on_cpu, 1e-9)
