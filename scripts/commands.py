"""The commands of the installed package: easgd-train is train.py, and the others are so, too.

In the wheel this folder and conf/ lie side by side in ``lightning_easgd_commands``, as they do in
the repository, so that scripts find each other and their configurations as they always do.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent
NEEDED = ("hydra", "matplotlib", "sklearn", "torchmetrics", "torchvision")


def train() -> None:
    """What ``python scripts/train.py`` does."""
    _run("train")


def advise() -> None:
    """What ``python scripts/advise.py`` does."""
    _run("advise")


def evaluate() -> None:
    """What ``python scripts/evaluate.py`` does."""
    _run("evaluate")


def _run(script: str) -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"easgd-{script} needs {', '.join(missing)}: pip install -e '.[scripts]'")
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
