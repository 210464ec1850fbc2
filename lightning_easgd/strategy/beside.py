"""Checkpoints of worker 0, beside which those that were started with it put their own states.

They train at their own pace and meet in no collective. So worker 0 says with its signs of life
which checkpoints it has made, and each other worker writes its file at the end of its step.

[Note: no path travels] What comes from a server is the name of a checkpoint and the id of its save.
A worker looks for the name below the folders that its launcher's worker 0 named when training
began, as it does under DDP, and writes only where worker 0's own file of this save already is.
So nobody who reaches a server makes a worker write elsewhere.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from lightning.fabric.utilities import rank_zero_warn

from lightning_easgd.checkpoint.files import is_save_id, is_there, worker_file
from lightning_easgd.server.courier import Courier
from lightning_easgd.server.teams import MOST_SAVES

log = logging.getLogger(__name__)

_PATIENCE = 10.0
"""Seconds in which a file of worker 0 becomes visible."""
_STOPPING = 30.0
"""Seconds in which worker 0 saves where all are told to stop; some launchers wait no longer."""
_PAUSE = 0.1
"""Seconds between two questions whether it has."""

_NO_NAME = re.compile(r"[\x00-\x1f\\]|::|://")


class Beside:
    """What a worker knows of worker 0's checkpoints; of worker 0 itself, what it tells.

    Args:
        courier: of this worker.
        rank: of this worker.
        folders: below which worker 0 saves.
    """

    def __init__(self, courier: Courier, rank: int, folders: Sequence[str]) -> None:
        self._courier, self._rank, self.folders = courier, rank, folders
        self._answered: set[str] = set()
        self._since: dict[str, float] = {}
        self._until: float | None = None
        self._warned = False

    def made(self, path: str, save: str) -> None:
        """Worker 0 has made a checkpoint: tell the others."""
        if (name := self._name_of(path)) is None:
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{path} has the center and worker 0's own state, and no other worker's: they"
                    f" know of checkpoints below {', '.join(self.folders)} only. Save there, or set"
                    " Trainer(default_root_dir=...) or ModelCheckpoint(dirpath=...)."
                )
            return
        others = [pair for pair in self._courier.saves.items() if pair[0] != name]
        self._courier.saves = dict([*others, (name, save)][-MOST_SAVES:])
        self._courier.ask(partial(self._courier.beat, once=True))

    def removed(self, path: str) -> None:
        """Worker 0 removes a checkpoint: tell of it no more."""
        name, saves = self._name_of(path), self._courier.saves
        self._courier.saves = {other: save for other, save in saves.items() if other != name}

    def _name_of(self, path: str) -> str | None:
        """A path as it is called below one of the folders."""
        path = absolute(path)
        under = (f"{folder.rstrip('/')}/" for folder in self.folders)
        names = (path.removeprefix(each) for each in under if path.startswith(each))
        return next(filter(_is_name, names), None)

    def due(self) -> list[tuple[str, str]]:
        """Path and id of each checkpoint that waits for this worker's own state."""
        found = []
        for name, save in dict(self._courier.told_saves).items():
            if not (_is_name(name) and is_save_id(save)) or save in self._answered:
                continue
            paths = (f"{folder.rstrip('/')}/{name}" for folder in self.folders)
            path = next((each for each in paths if is_there(worker_file(each, save, 0))), None)
            if path is not None:
                found.append((path, save))
            elif time.monotonic() > self._since.setdefault(save, time.monotonic()) + _PATIENCE:
                self._give_up(name, save)
        return found

    def _give_up(self, name: str, save: str) -> None:
        self._answered.add(save)
        if not self._warned:
            self._warned = True
            log.warning(
                "Worker %d on %s does not see the checkpoint %r of worker 0 in %s, so its own state"
                " is not saved. Save to a folder that all machines share, such as one on a network"
                " file system.",
                *(self._rank, platform.node(), name, ", ".join(self.folders)),
            )

    def await_due(self) -> list[tuple[str, str]]:
        """As :meth:`due`, where all stop and worker 0 is about to save; not for long."""
        if self._until is None:
            self._until = time.monotonic() + _STOPPING
        while not (found := self.due()) and (left := self._until - time.monotonic()) > 0:
            with suppress(Exception):  # no server answers
                self._courier.ask(partial(self._courier.beat, once=True)).result(left)
            time.sleep(_PAUSE)
        return found

    def answered(self, made: Sequence[tuple[str, str]]) -> None:
        """This worker has written its own state beside these, or could not."""
        self._answered.update(save for _, save in made)


def absolute(path: str) -> str:
    """A path of this machine's from its root on; another one as it is."""
    return path if "://" in path or "::" in path else os.path.abspath(path)


def _is_name(name: object) -> bool:
    """Whether a string, perhaps from elsewhere, names something below a folder, and only that."""
    if not isinstance(name, str) or not 0 < len(name) <= 1024 or _NO_NAME.search(name):
        return False
    return not {"", ".", ".."} & set(name.split("/"))
