"""Lightning's private names: all that are used, here and nowhere else.

tests/test_internals.py fails with the name of one that a new Lightning moved. What the strategy
inherits from DDPStrategy, the seams made for subclasses, is checked there too.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from typing_extensions import override

SignalHandler = Callable[[int, Any], None]
StrategyRegistry = _StrategyRegistry
WrappingCheckpointIO = _WrappingCheckpointIO
Context = Callable[[], AbstractContextManager[None]]


def wrap_innermost(storage: WrappingCheckpointIO, wrap: Callable[[Any], CheckpointIO]) -> None:
    """Put ``wrap(inner)`` in the place of the storage ``inner`` in the middle of plugins."""
    while isinstance(storage.checkpoint_io, WrappingCheckpointIO):
        storage = storage.checkpoint_io
    storage._checkpoint_io = wrap(storage.checkpoint_io)


class LoopHooks:
    """Methods of one trainer's own objects that are replaced until :meth:`restore`.

    Other trainers and strategies keep theirs.

    Args:
        trainer: whose signal handlers are not registered yet.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._fit_loop = trainer.fit_loop
        self._epoch_loop = trainer.fit_loop.epoch_loop
        self._connector = trainer._signal_connector
        self._checkpoints = trainer._checkpoint_connector
        self._logging = trainer._logger_connector
        self._replaced: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._callbacks: list[Callback] = []

    def restore(self) -> None:
        """Put back what was replaced."""
        if self._callbacks:
            self._trainer.callbacks = self._callbacks  # type: ignore[attr-defined]
        for owner, name in [(owner, name) for (_, name), (owner, _) in self._replaced.items()]:
            self._undo(owner, name)

    def on_sigterm(self, handler: SignalHandler) -> None:
        """Handle SIGTERM by ``handler`` instead of by a collective."""
        self._replace(self._connector, "_sigterm_notifier_fn", handler)

    def on_preemption(self, handler: SignalHandler) -> Callable[[], None]:
        """Handle SLURM's requeue signal by ``handler``; returns what saves and requeues."""
        save_and_requeue = self._connector._slurm_sigusr_handler_fn
        self._replace(self._connector, "_slurm_sigusr_handler_fn", handler)
        return lambda: save_and_requeue(signal.SIGUSR1, None)  # type: ignore[arg-type]

    def before_batch(self, action: Callable[[], None]) -> None:
        """Call ``action`` before every batch instead of broadcasting a SIGTERM flag."""
        self._replace(self._epoch_loop, "_broadcast_sigterm_tensor", action)

    def at_batch_end(self, action: Callable[[], None]) -> None:
        """Call ``action`` behind the hooks of a batch's end, before it is counted as completed."""
        self._precede(self._logging, "on_batch_end", action)

    def after_batch(self, context: Context) -> None:
        """Enter ``context`` when a batch and its hooks are over, for a validation after it."""
        self._surround(self._epoch_loop, "on_advance_end", context)

    def around_validation(self, context: Context) -> None:
        """Enter ``context`` for a validation of a fit, with everything that belongs to it."""
        self._surround(self._epoch_loop.val_loop, "run", context)

    def skip_validation(self) -> None:
        """Let another worker validate, and stop early by what it finds."""
        self._replace(self._epoch_loop.val_loop, "run", lambda: [])
        self._callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        kept = [each for each in self._callbacks if not isinstance(each, EarlyStopping)]
        self._trainer.callbacks = kept  # type: ignore[attr-defined]

    def around_preparing(self, context: Callable[[bool], AbstractContextManager[None]]) -> None:
        """Enter ``context`` where a loader gets its sampler; told whether it is for training."""
        connector = self._trainer._data_connector
        self._undo(connector, "_prepare_dataloader")
        lightnings_own = connector._prepare_dataloader

        def within(loader: object, shuffle: bool, mode: RunningStage) -> object:
            with context(mode is RunningStage.TRAINING):
                return lightnings_own(loader, shuffle, mode)

        self._replace(connector, "_prepare_dataloader", within)

    def around_dump(self, context: Context, finish: Callable[[Any], Any]) -> None:
        """Enter ``context`` while a checkpoint is made, and let ``finish`` have it there."""
        self._surround(self._checkpoints, "dump_checkpoint", context, finish)

    def around_restoring(self, action: Callable[[Any, Callable[[], None]], None]) -> None:
        """Call ``action`` where Lightning reads the checkpoint to restore, on all workers.

        Args:
            action: is called with the path, None where there is nothing to restore, and with what
                reads it.
        """
        self._undo(self._checkpoints, "resume_start")
        lightnings_own = self._checkpoints.resume_start

        def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
            action(checkpoint_path, lambda: lightnings_own(checkpoint_path, weights_only))

        self._replace(self._checkpoints, "resume_start", resume_start)

    def before_end(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the last epoch is over, ahead of all hooks of the end."""
        self._precede(self._fit_loop, "on_run_end", action)

    def before_epoch_end(self, action: Callable[[], None]) -> None:
        """Call ``action`` when a training epoch is over, ahead of hooks and epoch metrics."""
        self._precede(self._fit_loop, "on_advance_end", action)

    def before_first_batch(self, action: Callable[[Any], None]) -> None:
        """Call ``action`` with the data fetcher, once, when the next epoch begins its batches."""

        def once(data_fetcher: Any) -> None:
            self._undo(self._epoch_loop, "on_run_start")
            action(data_fetcher)
            self._epoch_loop.on_run_start(data_fetcher)

        self._replace(self._epoch_loop, "on_run_start", once)

    def add_to_rows(self, more: Callable[[], dict[str, Any]]) -> None:
        """Add what ``more()`` gives to every row of metrics that Lightning logs while it trains."""
        log_row = self._logging.log_metrics

        def log_metrics(metrics: Any, step: int | None = None) -> None:
            adds = self._trainer.training and self._trainer.loggers
            log_row({**metrics, **more()} if adds else metrics, step)

        self._replace(self._logging, "log_metrics", log_metrics)

    def on_time_limit(self, action: Callable[[], None]) -> None:
        """Call ``action`` when a step ends past a Timer's limit, instead of broadcasting it.

        The timer says so itself, once, if it is to say anything.
        """

        def without_broadcast(timer: Timer) -> Callable[[pl.Trainer], None]:
            check, alone = timer._check_time_remaining, _OneWorker()

            def check_time_remaining(_: pl.Trainer) -> None:
                if not alone.should_stop:
                    check(alone)  # type: ignore[arg-type]
                if alone.should_stop:
                    action()

            return check_time_remaining

        for timer in self._step_timers():
            self._replace(timer, "_check_time_remaining", without_broadcast(timer))

    @property
    def tells_time(self) -> bool:
        """Whether a Timer that looks after every step is to say when its time is over."""
        return any(timer._verbose for timer in self._step_timers())

    def _step_timers(self) -> list[Timer]:
        return [
            timer
            for timer in self._trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(timer, Timer)
            and type(timer)._check_time_remaining is Timer._check_time_remaining
            and timer._interval == "step"
        ]

    def mark_terminated(self) -> None:
        """Let Lightning know of a SIGTERM."""
        self._connector.received_sigterm = True

    @property
    def terminated(self) -> bool:
        """Whether Lightning knows of a SIGTERM."""
        return self._connector.received_sigterm

    def _precede(self, owner: Any, name: str, action: Callable[[], None]) -> None:
        self._undo(owner, name)
        lightnings_own = getattr(owner, name)

        def both(*args: Any, **kwargs: Any) -> Any:
            action()
            return lightnings_own(*args, **kwargs)

        self._replace(owner, name, both)

    def _surround(
        self,
        owner: Any,
        name: str,
        context: Context,
        finish: Callable[[Any], Any] = lambda result: result,
    ) -> None:
        self._undo(owner, name)
        lightnings_own = getattr(owner, name)

        def within(*args: Any, **kwargs: Any) -> Any:
            with context():
                return finish(lightnings_own(*args, **kwargs))

        self._replace(owner, name, within)

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self._undo(owner, name)
        before = vars(owner).get(name)
        self._replaced[id(owner), name] = owner, before
        setattr(owner, name, _Replacement(owner, name, method, before))

    def _undo(self, owner: Any, name: str) -> None:
        if (id(owner), name) in self._replaced:
            _, before = self._replaced.pop((id(owner), name))
            vars(owner).pop(name, None)
            if before is not None:
                setattr(owner, name, before)


class _Replacement:
    """What an owner has in the place of a method; a copy of the owner has the method itself.

    Args:
        owner: has it.
        name: of the method.
        method: is called instead.
        before: what the owner itself, not its class, had there.
    """

    def __init__(self, owner: Any, name: str, method: Callable[..., Any], before: Any) -> None:
        self._copied = (itself, (before,)) if before is not None else (getattr, (owner, name))
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return self._copied


def itself(value: Any) -> Any:
    """The value, for copies that are to hold it instead of what stood in its place."""
    return value


def is_interactive() -> bool:
    """Whether Lightning takes this process for a notebook or an interpreter's prompt."""
    return bool(vars(accelerator_connector)["_IS_INTERACTIVE"])


class _OneWorker:
    """What a Timer asks of a trainer, where no other worker is asked."""

    def __init__(self) -> None:
        self.should_stop = False

    @property
    def strategy(self) -> _OneWorker:
        return self

    def broadcast(self, value: bool) -> bool:
        return value


def train_loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders that training draws from."""
    combined: CombinedLoader | None = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def takes_iterator(trainer: pl.Trainer) -> bool:
    """Whether ``training_step`` draws its batches itself."""
    return isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)


def load_loader_states(trainer: pl.Trainer) -> bool:
    """Give the loaders the states that Lightning read and did not use; whether there were any."""
    fit_loop = trainer.fit_loop
    states = fit_loop._combined_loader_states_to_load
    if not states or fit_loop._combined_loader is None:
        return False
    fit_loop._combined_loader._load_state_dicts(states)
    fit_loop._combined_loader_states_to_load = []
    return True


def count_epoch(trainer: pl.Trainer) -> None:
    """Count the epoch that begins, if Lightning did not."""
    progress = trainer.fit_loop.epoch_progress
    if progress.total.ready == trainer.current_epoch:
        progress.increment_ready()
        progress.increment_started()


def end_saved_epoch(trainer: pl.Trainer, data_fetcher: Any) -> None:
    """Validate after the last batch of an epoch, if it was saved before that.

    Lightning would take another batch, or begin the next epoch without the validation.
    """
    loop = trainer.fit_loop.epoch_loop
    begun = loop.batch_progress.current.ready and not loop.val_loop.batch_progress.total.ready
    if loop.restarting and begun and loop._is_training_done:
        loop.restarting = False
        loop.on_advance_end(data_fetcher)


def starts_resumed_epoch(trainer: pl.Trainer) -> bool:
    """Whether a resumed run is about to take the first batch of an epoch."""
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    resumed = fit_loop.is_resuming or epoch_loop.restarting
    return resumed and epoch_loop.batch_progress.current.ready == 0


def stops_early(trainer: pl.Trainer) -> bool:
    """Whether training ends after this batch because somebody set ``trainer.should_stop``."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def show_in_bar(trainer: pl.Trainer, name: str, text: str) -> None:
    """Show a text among the metrics in Lightning's progress bar, which takes numbers else."""
    trainer._logger_connector._progress_bar_metrics[name] = text  # type: ignore[assignment]


def validates_by_clock(trainer: pl.Trainer) -> bool:
    """Whether validation is due after a time, not after a number of batches."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]
