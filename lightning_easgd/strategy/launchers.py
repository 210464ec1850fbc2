"""How workers that do not need each other are started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override


class SoloLauncher(_SubprocessScriptLauncher):
    """Lightning's, but that nobody is killed when a process that it started has failed."""

    @override
    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kw: Any
    ) -> Any:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kw)
