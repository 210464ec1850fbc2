"""scripts/measure.py: that it runs; what it finds depends on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lightning_easgd.algorithms import AVERAGED, RULES

ROOT = Path(__file__).parents[2]


def measure(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "measure.py"), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_ends_of_an_exchange_under_every_rule() -> None:
    told = measure("ends", "--millions", "0.01", "--tensors", "4", "--repetitions", "2")
    rows = {line.split()[0]: line.split() for line in told.splitlines()}
    for name in [*RULES, *AVERAGED]:
        milliseconds, _, in_copies, to_easgd, _ = map(_number, rows[name][1:])
        assert min(milliseconds, in_copies, to_easgd) > 0
    assert rows["easgd"][4] == "1.000"
    kept = {name: float(rows[name][-1]) for name in [*RULES, *AVERAGED]}
    assert kept | {"easgd": 0, "local_sgd": 0, "downpour": 0, "slowmo": 1, "diloco": 1} == kept
    assert kept | {"adownpour": 1, "mvadownpour": 1} == kept


def _number(cell: str) -> float:
    return 0.0 if cell == "ms" else float(cell)
