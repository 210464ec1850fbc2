"""Lightning's private names: each is where we expect it, and what is replaced is put back."""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from processes import run_workers
from toy import Toy, loader, trainer

import lightning_easgd

SGD = partial(torch.optim.SGD, lr=0.1)
PYTORCH = "lightning.pytorch"

CLASSES = {
    f"{PYTORCH}.trainer.connectors.signal_connector:_SignalConnector": [
        *("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"),
    ],
    f"{PYTORCH}.loops.training_epoch_loop:_TrainingEpochLoop": [
        *("_broadcast_sigterm_tensor", "on_run_start", "on_advance_end"),
    ],
    f"{PYTORCH}.loops.fit_loop:_FitLoop": ["on_advance_end", "is_resuming", "_can_stop_early"],
    f"{PYTORCH}.loops.evaluation_loop:_EvaluationLoop": ["run"],
    f"{PYTORCH}.trainer.connectors.checkpoint_connector:_CheckpointConnector": [
        *("resume_start", "dump_checkpoint"),
    ],
    f"{PYTORCH}.trainer.connectors.logger_connector.logger_connector:_LoggerConnector": [
        *("log_metrics", "on_batch_end"),
    ],
    f"{PYTORCH}.plugins.io.wrapper:_WrappingCheckpointIO": ["checkpoint_io"],
    f"{PYTORCH}.trainer.connectors.data_connector:_DataConnector": ["_prepare_dataloader"],
    f"{PYTORCH}.loops.fetchers:_DataLoaderIterDataFetcher": [],
    f"{PYTORCH}.strategies.launchers.multiprocessing:_MultiProcessingLauncher": [
        *("get_extra_results", "update_main_process_results", "is_interactive_compatible"),
    ],
    f"{PYTORCH}.strategies.launchers.subprocess_script:_SubprocessScriptLauncher": [
        *("launch", "_call_children_scripts"),
    ],
    f"{PYTORCH}.callbacks:Timer": ["_check_time_remaining"],
    f"{PYTORCH}.strategies:DDPStrategy": ["_configure_launcher"],
    "lightning.fabric.strategies.registry:_StrategyRegistry": ["register"],
}
"""Private classes and methods that are used."""

ATTRIBUTES = {
    "_val_check_time_interval": type(None),
    "_logger_connector._progress_bar_metrics": dict,
    "_signal_connector.received_sigterm": bool,
    "fit_loop._combined_loader": type(None),
    "fit_loop._data_fetcher": type(None),
    "fit_loop.epoch_loop.restarting": bool,
    "fit_loop.epoch_loop.batch_progress.current.ready": int,
    "strategy._checkpoint_io": type(None),
    "strategy._layer_sync": type(None),
    "strategy._timeout": object,
}
"""Attributes of a new trainer that are used, and their types."""


@pytest.mark.parametrize(("where", "names"), CLASSES.items(), ids=str)
def test_methods_are_where_they_were(where: str, names: list[str]) -> None:
    module, cls = where.split(":")
    owner = getattr(importlib.import_module(module), cls)
    assert [name for name in names if not hasattr(owner, name)] == []


@pytest.mark.parametrize(("path", "kind"), ATTRIBUTES.items(), ids=str)
def test_attributes_are_where_they_were(path: str, kind: type) -> None:
    value: Any = pl.Trainer(strategy="easgd", accelerator="cpu", devices=1, logger=False)
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, kind)


def test_a_timers_interval_and_voice_are_where_they_were() -> None:
    timer = pl.callbacks.Timer(duration={"hours": 1})
    assert (timer._interval, timer._verbose) == ("step", True)


def test_what_tells_a_notebook_is_where_it_was() -> None:
    from lightning.pytorch.trainer.connectors import accelerator_connector

    assert isinstance(accelerator_connector._IS_INTERACTIVE, bool)


def test_the_flag_is_broadcast_before_every_batch_of_several_workers() -> None:
    """Should this fail, Lightning may no longer need the replacement."""
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)


def test_no_other_module_uses_a_private_name_of_lightnings() -> None:
    root = Path(lightning_easgd.__file__).parent
    torchs = {
        "_buffers",
        "_parameters",
        "_forward_pre_hooks",
        "_non_persistent_buffers_set",
        "_get_default_store",
        "_set_pg_timeout",
    }
    torchs |= {"_load_from_state_dict", "_save_to_state_dict", "_version"}
    for path in root.rglob("*.py"):
        if path.name == "lightning_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            inherited = ast.unparse(node.value) in ("self", "cls", "super()")
            dunder = node.attr.startswith("__")
            known = node.attr in torchs or node.attr.startswith("_foreach_")
            assert inherited or dunder or known, f"{path}: {node.attr}"


def replaced(fitting: pl.Trainer) -> tuple[bool, bool]:
    return (
        "_broadcast_sigterm_tensor" in vars(fitting.fit_loop.epoch_loop),
        "_sigterm_notifier_fn" in vars(fitting._signal_connector),
    )


def watch_replacement(rank: int, strategy: str) -> Any:
    module, seen = Toy(SGD), []
    fitting = trainer(1, strategy)
    module.on_train_start = lambda: seen.append(replaced(fitting))
    fitting.fit(module, loader(rank, 2))
    return seen, replaced(fitting)


def test_only_this_trainer_is_changed_and_only_while_it_runs() -> None:
    assert run_workers(watch_replacement, "easgd", workers=1) == [([(True, True)], (False, False))]
    assert run_workers(watch_replacement, "ddp", workers=1) == [([(False, False)], (False, False))]
