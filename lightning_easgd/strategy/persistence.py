"""Checkpoints as Lightning asks a strategy for them: the center, and beside it every worker."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_easgd.checkpoint.own_pace import save_own
from lightning_easgd.checkpoint.restoring import Restorer, agree_on_path
from lightning_easgd.checkpoint.resumed import Resumed
from lightning_easgd.checkpoint.worker_checkpoints import (
    CheckpointError,
    WorkerCheckpoints,
    describe,
    listing,
)
from lightning_easgd.communication import WorkerGroup, monitored
from lightning_easgd.exchange.optimizers import require_complete
from lightning_easgd.strategy.beside import Beside
from lightning_easgd.strategy.checkpoint_io import ordered_writes
from lightning_easgd.strategy.fit import Fit
from lightning_easgd.strategy.lightning_internals import LoopHooks
from lightning_easgd.strategy.options import Options

_POLL_SECONDS = 0.02


class Owner(Protocol):
    """What is asked of the strategy whose checkpoints they are."""

    options: Options

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """How files are written."""

    @property
    def global_rank(self) -> int:
        """Of this worker."""

    @property
    def world_size(self) -> int:
        """How many workers there are."""

    @property
    def solo(self) -> bool:
        """Whether no worker waits for another."""


@dataclass(kw_only=True)
class Persistence:
    """Saves what a fit is, and restores it."""

    owner: Owner
    """The strategy."""
    collect: Callable[[Any], list[Any]]
    """Gives a small value of every worker, in rank order, given that of this one."""
    arrange: Callable[[], list[list[list[int]]]]
    """Gives the ranks of every group, as arrange_levels; all workers call it."""
    strict_resume: bool
    """Whether it is an error if the own state of a worker is missing or damaged in the checkpoint
    that training resumes from."""
    timeout: timedelta
    """How long a worker waits for others."""
    resumed: Resumed | None = field(default=None, init=False)
    """From what the fit goes on, until it does; None: it starts afresh."""
    goes_on_from: str = field(default="no checkpoint", init=False)
    """What Lightning restored of this fit, in words."""
    _restoring: bool = field(default=False, init=False)
    _beside: Beside | None = field(default=None, init=False)
    _hooks: LoopHooks | None = field(default=None, init=False)
    _saved: WorkerCheckpoints | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has saved and restored nothing yet."""
        return vars(replace(self))

    def save(
        self, checkpoint: dict[str, Any], path: str, fit: Fit | None, storage_options: Any
    ) -> None:
        """Write the center, and beside it every worker's own state; see worker_checkpoints.py.

        After an exception that one worker may be alone with, and for weights only, the center.
        """
        weights_only = "optimizer_states" not in checkpoint
        self._beside = None if fit is None else fit.beside
        if self.owner.solo and self.owner.global_rank > 0:
            if fit is not None and not (fit.alone or weights_only):
                self._save_own(checkpoint, fit)
        elif fit is None or fit.alone or weights_only:
            if fit is not None:
                _ = fit.own  # from here on it counts what moves
            self.files().save_center_only(checkpoint, path, storage_options)
        else:
            self.files().save(
                *(checkpoint, path),
                exchange=fit.exchange,
                own=fit.own,
                storage_options=storage_options,
            )

    def _save_own(self, checkpoint: dict[str, Any], fit: Fit) -> None:
        """Write this worker's own state beside the checkpoints that worker 0 has made."""
        beside, rank = fit.beside, self.owner.global_rank
        assert beside is not None
        stops = fit.exchange.stopping.by_exception
        made = beside.await_due() if stops else beside.due()
        try:
            if made:
                writes = self.files().writes
                save_own(writes, checkpoint, made, rank=rank, exchange=fit.exchange, own=fit.own)
        except OSError as error:
            warnings.warn(
                f"Worker {rank} could not save its own state beside {made[0][0]}"
                f" ({describe(error)}). It would start at the center.",
                stacklevel=2,
            )
        beside.answered(made)

    def remove(self, path: str) -> None:
        """Remove a checkpoint and the workers' files."""
        if self._beside is not None:
            self._beside.removed(path)
        self.files().remove(path)

    def _made(self, path: str, save: str) -> None:
        if self._beside is not None:
            self._beside.made(path, save)

    def files(self) -> WorkerCheckpoints:
        """What writes and removes checkpoints, through the storage that the strategy has now."""
        owner, storage = self.owner, self.owner.checkpoint_io
        if self._saved is None or self._saved.writes.storage is not storage:
            self._saved = WorkerCheckpoints(
                ordered_writes(storage),
                rank=owner.global_rank,
                workers=owner.world_size,
                gather=self.collect,
                timeout=self.timeout.total_seconds(),
                made=self._made,
            )
        return self._saved

    def await_restoring(self, trainer: pl.Trainer) -> None:
        """Have all workers read the same where Lightning restores a checkpoint."""
        self.resumed, self.goes_on_from = None, "no checkpoint"
        # Where this worker looks; later, callbacks have worker 0's.
        folders = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
        looked_in = [os.fspath(folder) for folder in folders if folder is not None]
        self._hooks = LoopHooks(trainer)
        self._hooks.around_restoring(partial(self._restore, looked_in))

    def _restore(
        self, looked_in: list[str], path: str | Path | None, read: Callable[[], None]
    ) -> None:
        path = None if path is None else os.fspath(path)
        agree_on_path(path, self.collect, looked_in=looked_in)
        self._restoring = True
        try:
            read()
        finally:
            self._restoring = False

    def load(
        self,
        path: str,
        read: Callable[..., dict[str, Any]],
        trainer: pl.Trainer | None,
        weights_only: bool | None,
    ) -> dict[str, Any]:
        """Read a checkpoint; where Lightning restores one, all workers do, each its own state."""
        if weights_only is None and path.startswith(("http://", "https://")):
            weights_only = True  # Lightning's default would unpickle it
        read = partial(read, weights_only=weights_only)
        if not self._restoring or trainer is None:
            return read()
        owner, fitting = self.owner, trainer.state.fn == TrainerFn.FITTING
        restorer = Restorer(owner.checkpoint_io, rank=owner.global_rank, gather=self.collect)
        found = restorer.read(path, read, weights_only=weights_only, own=fitting)
        self.goes_on_from = found.name
        if fitting:
            self.resumed = restorer.resume(
                found,
                strict=self.strict_resume,
                groups=self.arrange(),
                tied=owner.options.tied is not None,
            )
            if self.resumed is None:
                rank_zero_info(f"{path} holds no states of workers: all start at its weights.")
        return found.checkpoint

    def load_optimizers(self, load: Callable[[], None], optimizers: list[Optimizer]) -> None:
        """Give optimizers their states back.

        Raises:
            CheckpointError: the states are not theirs.
        """
        try:
            load()
            require_complete(optimizers)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise CheckpointError(
                f"The optimizer states in the checkpoint do not fit {kinds}"
                f" ({type(error).__name__}: {error}). Resume with the optimizer that it was saved"
                " with, or begin with fresh ones at its weights: module.load_state_dict(...) and"
                " fit without ckpt_path."
            ) from error

    def go_on(self, fit: Fit, load_module: Callable[[], None]) -> None:
        """Give a fit back what was saved of it.

        Args:
            fit: whose optimizers have their states.
            load_module: gives the module its weights once more.
        """
        if self.resumed is not None and fit.exchange.module_changed():
            # A hook put other parameters in the place of those that had been restored.
            load_module()
            fit.exchange.follow_module()
        own = fit.own
        if self.resumed is None:
            return
        self.resumed.restore(fit.exchange, own)
        solo = self.owner.solo
        rank_zero_info(self.resumed.note(self.owner.world_size, together=not solo))
        say = warnings.warn if solo else rank_zero_warn
        for warning in self.resumed.warnings():
            say(warning, stacklevel=2)

    def take_resumed(self) -> Resumed | None:
        """What the fit goes on from; forgotten here, for it is as large as a worker's state."""
        resumed, self.resumed = self.resumed, None
        return resumed

    def give_up(self) -> None:
        """Give up what is being saved: other workers may not do their part."""
        if self._saved is not None:
            self._saved.give_up()

    def finish_writing(self, group: WorkerGroup) -> None:
        """Wait until what plugins queued is written, on all workers: what follows may read it."""
        saved, error, rank = self.files(), None, self.owner.global_rank
        if not saved.writes.may_queue:  # the same on all workers
            return
        for ranks in (range(1, group.size), range(1)):  # worker 0 waits for the others' files
            try:
                if rank in ranks:
                    self._drain(saved, group)
            except Exception as raised:
                error = raised
            monitored.barrier(group, "The last checkpoint", patiently=True)
            saved.expect_no_more()
        everybody = enumerate(group.gather(None if error is None else describe(error)))
        failed = {rank: text for rank, text in everybody if text is not None}
        if error is not None:
            raise error
        if failed:
            raise CheckpointError(f"A checkpoint was not saved: {listing(failed)}.")

    def _drain(self, saved: WorkerCheckpoints, group: WorkerGroup) -> None:
        """Wait for this worker's queue, and tell the others that it gets on."""
        done, since = saved.writes.done, time.monotonic()
        while saved.writes.queued and time.monotonic() < since + self.timeout.total_seconds():
            if saved.writes.done != done:
                group.progress.enter("writing checkpoints")
                done, since = saved.writes.done, time.monotonic()
            time.sleep(_POLL_SECONDS)
        self.owner.checkpoint_io.teardown()

    def end(self) -> None:
        """Leave the trainer as it was, and forget what was saved."""
        if self._hooks is not None:
            self._hooks.restore()
        self._hooks = self._saved = self._beside = None
