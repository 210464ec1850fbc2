"""How workers are started, beside Lightning's launchers."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_easgd.telemetry import Telemetry


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


class ForkingLauncher(_MultiProcessingLauncher):
    """Lightning's, which brings telemetry back from worker 0 besides metrics and weights."""

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        telemetry = asdict(trainer.strategy.telemetry)  # type: ignore[attr-defined]
        return {**super().get_extra_results(trainer), "easgd_telemetry": telemetry}

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        counted = Telemetry(**extra.pop("easgd_telemetry"))
        trainer.strategy.telemetry = counted  # type: ignore[attr-defined]
        super().update_main_process_results(trainer, extra)


def without_processes(launcher: Any) -> Any:
    """A launcher for a copy of its strategy, which has started no scripts: they can't be copied."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher = copy(launcher)
        launcher.procs = []
    return launcher
