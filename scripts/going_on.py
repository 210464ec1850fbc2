"""How far a run came, and how it goes on."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from mmap import mmap
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from launching import is_worker
from omegaconf import DictConfig
from plugging import config_folders

_WIDTH = 20
_PLAIN = re.compile(r"[\w./:@~+-]+")
"""What Hydra's parser reads as text without quotes."""


class Steps:
    """The optimizer steps of a run, in a file that is right even if the process is killed."""

    def __init__(self, folder: Path) -> None:
        path = folder / "steps"
        self.before = taken(folder)
        """Those of an earlier start, or None."""
        path.write_text(f"{self.before or 0:<{_WIDTH}}")  # whole, so that the disk has room for it
        with path.open("r+b") as file:
            self._map = mmap(file.fileno(), _WIDTH)

    def write(self, step: int) -> None:
        """Take down a step, at the cost of a write to memory."""
        self._map[:] = b"%-*d" % (_WIDTH, step)


def taken(folder: Path) -> int | None:
    """The steps that the run in a folder took; None if it began none."""
    path = folder / "steps"
    return int(path.read_text()) if path.exists() else None


def advice(cfg: DictConfig) -> str:
    """What the run of this job reached, its newest checkpoint, and what resumes it: a line each."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    steps = taken(folder)
    if steps is None:
        return ""
    lines = [f"  reached     step {steps}"]
    checkpoint = newest_checkpoint((cfg.get("checkpoint") or {}).get("dirpath"))
    if checkpoint is None:
        return "\n".join([*lines, "  checkpoint  none was written"])
    typed = command(sys.argv[0], _flags(sys.argv[1:]), hydra_cfg.overrides.task, checkpoint, folder)
    if is_worker():
        typed = f"the same command with {shlex.join(_further(checkpoint, folder))}"
    return "\n".join([*lines, f"  checkpoint  {_described(checkpoint)}", f"  to go on    {typed}"])


def newest_checkpoint(folder: str | Path | None) -> Path | None:
    """From which a run can be resumed, among those in a folder."""
    found = Path(folder).glob("*.ckpt") if folder else []
    left = [path for path in found if path.name != "final.ckpt"]  # weights alone
    return max(left, key=lambda path: path.stat().st_mtime, default=None)


def again(overrides: Sequence[str]) -> str:
    """The command that runs one job of a sweep by itself."""
    return command(sys.argv[0], _flags(sys.argv[1:]), overrides)


def command(
    script: str,
    flags: Sequence[str],
    overrides: Sequence[str],
    checkpoint: Path | None = None,
    folder: Path | None = None,
) -> str:
    """What was typed, with where it goes on, if it does."""
    kept = [each for each in overrides if not each.lstrip("+").startswith(("ckpt_path=", "hydra."))]
    further = _further(checkpoint, folder) if checkpoint and folder else []
    return shlex.join([*_program(script), *flags, *kept, *further])


def search_again(folder: Path) -> str:
    """The command of a search, for it to go on in its folder."""
    typed = [each for each in sys.argv[1:] if not each.startswith("hydra.sweep.dir=")]
    return shlex.join([*_program(sys.argv[0]), *typed, f"hydra.sweep.dir={quoted(folder)}"])


def _program(script: str) -> list[str]:
    return ["python", script] if script.endswith(".py") else [script]


def _further(checkpoint: Path, folder: Path) -> list[str]:
    return [f"ckpt_path={quoted(checkpoint)}", f"hydra.run.dir={quoted(folder)}"]


def _flags(arguments: Sequence[str]) -> list[str]:
    """Where Hydra looks for files, which is not among its overrides."""
    return [each for folder in config_folders(arguments) for each in ("--config-dir", str(folder))]


def quoted(path: str | Path) -> str:
    """A path as Hydra's parser reads it."""
    text = os.fspath(path)
    if _PLAIN.fullmatch(text):
        return text
    # Backslashes escape quotes only, and each other before them.
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def _described(checkpoint: Path) -> str:
    import torch

    try:
        loaded = torch.load(checkpoint, map_location="meta", mmap=True, weights_only=True)
        return f"{checkpoint}, step {loaded['global_step']}"
    except Exception:  # objects of the user's own, or no such number in it
        return str(checkpoint)
