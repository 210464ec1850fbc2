"""Results of a folder, as JSON lines that a later run goes on with, and how they were found."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from comparing.result import Result

_PACKAGES = ("torch", "lightning", "lightning-easgd")


class Store:
    """The results of a folder.

    Args:
        folder: where results.jsonl and about.json are or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "results.jsonl"

    def read(self) -> list[Result]:
        """All results, in the order in which they were found.

        Raises:
            ValueError: a line is of another version of this script, or damaged.
        """
        if not self._path.exists():
            return []
        found = []
        for number, line in enumerate(self._path.read_text().splitlines(), 1):
            try:
                found.append(Result.from_json(json.loads(line)))
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{self._path} got a line {number} that is no result of this version. Take"
                    " the line away, or set another hydra.run.dir."
                ) from None
        return found

    def add(self, result: Result) -> None:
        """Append one."""
        with self._path.open("a") as file:
            print(json.dumps(result.to_json()), file=file)

    def about(self) -> dict[str, Any]:
        """How its results were found; nothing where that was never written.

        Raises:
            ValueError: about.json is damaged.
        """
        path = self.folder / "about.json"
        try:
            found = json.loads(path.read_text()) if path.exists() else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged. Train in another hydra.run.dir.")
        return found

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write how results of now are found, with the machine, the versions and the command."""
        text = json.dumps({**_here(), **about}, indent=2, ensure_ascii=False)
        (self.folder / "about.json").write_text(f"{text}\n")


def _here() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # it may run from a folder
            versions[name] = version(name)
    machine = {"name": platform.node(), "system": platform.platform(), "cpu": _cpu()}
    return {
        "command": " ".join(["python", *sys.argv]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "machine": machine | {"cores": os.cpu_count()},
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None
