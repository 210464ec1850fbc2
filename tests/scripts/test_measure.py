"""scripts/measure.py: that it runs; what it finds depends on the machine."""

from __future__ import annotations

from pathlib import Path

from processes import run_script

from lightning_easgd.algorithms import AVERAGED, RULES

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure.py"


def test_both_ends_of_an_exchange_under_every_rule(tmp_path: Path) -> None:
    options = ["ends", "--millions", "0.01", "--tensors", "4", "--repetitions", "2"]
    told = run_script(SCRIPT, options, folder=tmp_path, workers=1)
    rows = {line.split()[0]: line.split() for line in told.splitlines() if line.strip()}
    for name in [*RULES, *AVERAGED]:
        milliseconds, _, in_copies, to_easgd, _ = map(_number, rows[name][1:])
        assert min(milliseconds, in_copies, to_easgd) > 0
    assert rows["easgd"][4] == "1.000"
    kept = {name: float(rows[name][-1]) for name in [*RULES, *AVERAGED]}
    assert kept | {"easgd": 0, "local_sgd": 0, "downpour": 0, "slowmo": 1, "diloco": 1} == kept
    assert kept | {"adownpour": 1, "mvadownpour": 1} == kept


def _number(cell: str) -> float:
    return 0.0 if cell == "ms" else float(cell)
