"""Writes trajectories.json from what the code does now: python tests/golden/write.py.

Only where a change of the arithmetic is wanted: say in its message which cases changed, and why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, [TESTS.parent, TESTS / "helpers", TESTS.parent / "scripts"])

from processes import run_workers  # noqa: E402
from trajectories import GOLDEN, run  # noqa: E402


def main() -> None:
    """Train all cases with 2 and 4 workers, and write what they did."""
    found = {}
    for workers in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            runs = run_workers(run, workers, Path(folder), workers=workers, timeout=600)
        for name in runs[0]:
            found[f"{workers} workers: {name}"] = [each[name] for each in (runs[0], runs[-1])]
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(found)} trajectories in {GOLDEN}")


if __name__ == "__main__":
    main()
