"""Checkpoints as Lightning asks a strategy for them: the center, and beside it every worker."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_easgd.checkpoint.own_values import OwnValues
from lightning_easgd.checkpoint.restoring import Restorer, Resumed, agree_on_path
from lightning_easgd.checkpoint.worker_checkpoints import (
    CheckpointError,
    WorkerCheckpoints,
    describe,
    listing,
)
from lightning_easgd.communication import WorkerGroup, monitored
from lightning_easgd.exchange.optimizers import require_complete
from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO, ordered_writes
from lightning_easgd.strategy.collectives import CollectiveStrategy
from lightning_easgd.strategy.lightning_internals import LoopHooks, WrappingCheckpointIO

_POLL_SECONDS = 0.02


class PersistentStrategy(CollectiveStrategy):
    """Saves and restores the exchange that a subclass sets up.

    Args:
        strict_resume: whether it is an error if the own state of a worker is missing or damaged in
            the checkpoint that training resumes from.
        exchange_timeout: how long a worker waits for others.
        **options: of CollectiveStrategy.
    """

    def __init__(self, *, strict_resume: bool, exchange_timeout: timedelta, **options: Any) -> None:
        super().__init__(**options)
        self._strict_resume = strict_resume
        self._exchange_timeout = exchange_timeout
        self._resumed: Resumed | None = None
        self._restoring = False
        self._stop_restoring: Callable[[], object] | None = None
        self._saved: WorkerCheckpoints | None = None
        self._own: OwnValues | None = None

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """How files are written: ours, also within plugins that wrap one, unless it was chosen."""
        # Not sooner: what is there is taken for the user's choice, and a plugin refused beside it.
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # where it has none
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that checkpoints hold: the center, or its running average.

        The single place that names them.
        """
        if self._exchange is None or self.lightning_module is None:
            return super().lightning_module_state_dict()
        return self._exchange.center_state_dict(
            self.lightning_module, latest=not self._alone, delivered=True
        )

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any = None,
    ) -> None:
        """Write the center, and beside it every worker's own state; see worker_checkpoints.py.

        After an exception that one worker may be alone with, and for weights only, the center.
        """
        path, exchange, own = os.fspath(filepath), self._exchange, self._own_values()
        weights_only = "optimizer_states" not in checkpoint
        if exchange is None or own is None or self._alone or weights_only:
            self._checkpoints().save_center_only(checkpoint, path, storage_options)
        else:
            self._checkpoints().save(
                checkpoint, path, exchange=exchange, own=own, storage_options=storage_options
            )

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self._checkpoints().remove(os.fspath(filepath))

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        self._resumed = self._own = None
        trainer = self.lightning_module.trainer
        # Where this worker looks; later, callbacks have worker 0's.
        folders = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
        looked_in = [os.fspath(folder) for folder in folders if folder is not None]
        hooks = LoopHooks(trainer)
        hooks.around_restoring(partial(self._restore, looked_in))
        self._stop_restoring = hooks.restore

    def _restore(
        self, looked_in: list[str], path: str | Path | None, read: Callable[[], None]
    ) -> None:
        path = None if path is None else os.fspath(path)
        agree_on_path(path, self._collect, looked_in=looked_in)
        self._restoring = True
        try:
            read()
        finally:
            self._restoring = False

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; where Lightning restores one, all workers do, each its own state."""
        path = os.fspath(checkpoint_path)
        if weights_only is None and path.startswith(("http://", "https://")):
            weights_only = True  # Lightning's default is not, there
        read = partial(super().load_checkpoint, checkpoint_path, weights_only=weights_only)
        if not self._restoring:
            return read()
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        restorer = Restorer(self.checkpoint_io, rank=self.global_rank, gather=self._collect)
        found = restorer.read(path, read, weights_only=weights_only, own=fitting)
        if fitting:
            self._resumed = restorer.resume(
                found,
                strict=self._strict_resume,
                groups=self._arranged_groups(),
                tied=self.options.tied is not None,
            )
            if self._resumed is None:
                rank_zero_info(f"{path} holds no states of workers: all start at its weights.")
        return found.checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        # While training is set up already, as the learning-rate finder does when it is done.
        if self._exchange is not None:
            self._exchange.read_module()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        try:
            super().load_optimizer_state_dict(checkpoint)
            require_complete(self.optimizers)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise CheckpointError(
                f"The optimizer states in the checkpoint do not fit {kinds}"
                f" ({type(error).__name__}: {error}). Resume with the optimizer that it was saved"
                " with, or begin with fresh ones at its weights: module.load_state_dict(...) and"
                " fit without ckpt_path."
            ) from error
        exchange = self._exchange
        if self._resumed is not None and exchange is not None and exchange.module_changed():
            # A hook put other parameters in the place of those that had been restored.
            super().load_model_state_dict(checkpoint, strict=False)
            exchange.follow_module()
        own = self._own_values()
        if self._resumed is None or own is None or exchange is None:
            return
        self._resumed.restore(exchange, own)
        rank_zero_info(self._resumed.note(self.world_size))
        for warning in self._resumed.warnings():
            rank_zero_warn(warning)

    @override
    def on_train_start(self) -> None:
        self._own_values()
        super().on_train_start()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._saved is not None and self._alone:
            self._saved.give_up()
        super().on_exception(exception)

    def _finish_writing(self) -> None:
        """Wait until what plugins queued is written, on all workers: what follows may read it."""
        saved, group, error = self._checkpoints(), self._group, None
        if group is None or not saved.writes.may_queue:  # the same on all workers
            return
        for ranks in (range(1, self.world_size), range(1)):  # worker 0 waits for the others' files
            try:
                if self.global_rank in ranks:
                    self._drain(saved, group)
            except Exception as raised:
                error = raised
            monitored.barrier(group, "The last checkpoint", patiently=True)
            saved.expect_no_more()
        everybody = enumerate(self._collect(None if error is None else describe(error)))
        failed = {rank: text for rank, text in everybody if text is not None}
        if error is not None:
            raise error
        if failed:
            raise CheckpointError(f"A checkpoint was not saved: {listing(failed)}.")

    def _drain(self, saved: WorkerCheckpoints, group: WorkerGroup) -> None:
        """Wait for this worker's queue, and tell the others that it gets on."""
        done, since = saved.writes.done, time.monotonic()
        while (
            saved.writes.queued
            and time.monotonic() < since + self._exchange_timeout.total_seconds()
        ):
            if saved.writes.done != done:
                group.progress.enter("writing checkpoints")
                done, since = saved.writes.done, time.monotonic()
            time.sleep(_POLL_SECONDS)
        self.checkpoint_io.teardown()

    @override
    def teardown(self) -> None:
        if self._stop_restoring is not None:
            self._stop_restoring()
        self._stop_restoring = self._saved = self._own = None
        super().teardown()

    def _own_values(self) -> OwnValues | None:
        """What this worker's file will hold; what moves is counted from the first call on."""
        if self._own is None and self._exchange is not None:
            self._own = OwnValues(self._exchange.center, self._exchange.swap)
        return self._own

    def _checkpoints(self) -> WorkerCheckpoints:
        storage = self.checkpoint_io
        if self._saved is None or self._saved.writes.storage is not storage:
            self._saved = WorkerCheckpoints(
                ordered_writes(storage),
                rank=self.global_rank,
                workers=self.world_size,
                gather=self._collect,
                timeout=self._exchange_timeout.total_seconds(),
            )
        return self._saved
