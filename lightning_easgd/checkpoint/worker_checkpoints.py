"""What is saved beside a checkpoint, by which worker, under which name; see restoring.py.

[Note: layout] The main file is an ordinary Lightning checkpoint whose weights are the center::

    last.ckpt                           the center, what rank 0 always saves, and SharedState
    last.ckpt.workers/<save>-0.ckpt     WorkerState: what worker 0 knows besides
    last.ckpt.workers/<save>-1.ckpt     what worker 1 knows: its own of what rank 0 saves, too

One worker alone has no other file: its own state is in the main file's entry of ours. That entry
holds digests of the weights, of itself and of each worker's file, and is written last, where all of
these are seen: so the main file only ever points to workers' files that are complete, and a save
that is cut short leaves the files of the one before untouched.

[Note: nothing is in flight] Saving the center awaits the exchange in flight. Because overlap is
exact, awaiting it early changes no bit of what follows, so no sum needs to be stored.
"""

from __future__ import annotations

import platform
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from lightning_easgd.center.digest import fingerprint
from lightning_easgd.checkpoint.files import (
    ENTRY,
    is_link,
    is_there,
    remove_debris,
    remove_saves,
    worker_file,
    workers_folder,
)
from lightning_easgd.checkpoint.ordered_writes import OrderedWrites, Write
from lightning_easgd.checkpoint.own_values import OwnValues
from lightning_easgd.checkpoint.random_state import random_state
from lightning_easgd.checkpoint.state import FORMAT, SharedState, WorkerState
from lightning_easgd.communication.foreign import escape, quote
from lightning_easgd.exchange.exchange import Exchange

SHARED = {
    "state_dict",
    *("hyper_parameters", "hparams_name", "hparams_type"),
    *("datamodule_hyper_parameters", "datamodule_hparams_name", "datamodule_hparams_type"),
}
"""Entries of a Lightning checkpoint that all workers share; the rest is each worker's own."""

Gather = Callable[[Any], list[Any]]

_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.05


class CheckpointError(RuntimeError):
    """Workers could not write, or may not go on without, their parts of a checkpoint."""


class WorkerCheckpoints:
    """Saves the workers' own states beside checkpoints, and removes them.

    Args:
        writes: how files are written, on this worker.
        rank: this worker.
        workers: how many there are, p.
        gather: collects a plain value (as JSON has) of every worker on every worker, by rank.
        timeout: how long others may take, in seconds.
        made: told path and id of a save whose main file is there, by worker 0.
    """

    def __init__(
        self,
        writes: OrderedWrites,
        *,
        rank: int,
        workers: int,
        gather: Gather,
        timeout: float,
        made: Callable[[str, str], None] = lambda path, save: None,
    ) -> None:
        self.writes = writes
        self._rank = rank
        self._workers = workers
        self._gather = gather
        self._made = made
        self._short_patience = min(_PATIENCE_SECONDS, timeout / 2)
        # The others wait meanwhile, where writes are not queued.
        self._patience = timeout if writes.may_queue else self._short_patience
        self._asked: dict[str, list[str]] = {}
        self._given_up = False

    def give_up(self) -> None:
        """Wait for no other worker any more, in a write that is queued."""
        self._given_up = True

    def expect_no_more(self) -> None:
        """Wait no longer than it takes to see what is written: the others have written all."""
        self._patience = self._short_patience

    def save(
        self,
        checkpoint: dict[str, Any],
        path: str,
        *,
        exchange: Exchange,
        own: OwnValues,
        storage_options: Any = None,
    ) -> None:
        """Write a checkpoint and every worker's own state beside it; all workers must call it.

        Where each has its own pace, worker 0 calls it, and the others save_own.

        Args:
            checkpoint: Lightning's, as this worker dumped it.
            path: of the main file; that of worker 0 counts, as under DDP.
            exchange: of this worker.
            own: values of this worker's module.
            storage_options: passed on to the storage.

        Raises:
            CheckpointError: on all workers, if one could not write its part or worker 0 does not
                see it; the checkpoint before is as it was.
            OSError: on the worker that could not write.
        """
        exchange.drain()
        # A name may hold a score that every worker computed by itself.
        save = uuid.uuid4().hex[:12]
        if self._rank == 0:
            self._begin(path, save)
        said = self._gather([save, path, own.moved()])
        save, path, _ = said[0]
        moved = {name for _, _, names in said for name in names}
        of = {"save": save, "rank": self._rank, "exchange": exchange}
        mine = worker_state(checkpoint, weights=own.read(moved), **of).plain()

        def write_main(parts: Sequence[Sequence[Any]]) -> None:
            shared = SharedState(
                save=save,
                workers=self._workers,
                parts=[part[1:] for part in parts],
                own=mine if self._workers == 1 else None,
                **exchange.shared_state(),
            )
            entry = {"format": FORMAT, **shared.plain()}
            entry["digest"] = digest_of_main(checkpoint, entry)
            hosts = [part[0] for part in parts]
            self._write_main({**checkpoint, ENTRY: entry}, path, save, hosts, storage_options)

        if self._workers == 1:
            write_main([])
        else:
            self._write_together(mine, path, storage_options, write_main)

    def _begin(self, path: str, save: str) -> None:
        """Make room for a save, by worker 0."""
        if path not in self._asked:  # this process's own saves leave nothing
            with suppress(OSError):
                remove_debris(self.writes.storage, path)
            if is_link(folder := workers_folder(path)):
                warnings.warn(
                    f"{folder} is a link. Files of saves that were replaced are not removed through"
                    " links, and stay. Make it a folder, or link the folder that it lies in.",
                    stacklevel=2,
                )
        self._asked.setdefault(path, []).append(save)

    def _write_together(
        self,
        content: dict[str, Any],
        path: str,
        options: Any,
        write_main: Callable[[Sequence[Sequence[Any]]], None],
    ) -> None:
        """Write this worker's part; then, when all are there, worker 0 writes the main file."""
        save = content["save"]
        error, part = None, [platform.node(), *fingerprint(content)]
        try:
            self.writes.save(content, worker_file(path, save, self._rank), options, Write())
        except Exception as raised:
            error = raised
        parts = self._require_all(error, part, path, save)
        try:
            if self._rank == 0:
                write_main(parts)
        except Exception as raised:
            error = raised
        self._require_all(error, None, path, save)

    def _require_all(self, error: Exception | None, value: Any, path: str, save: str) -> list[Any]:
        """What every worker says; if one has an error all raise, and what was written goes."""
        said = self._gather([None if error is None else describe(error), value])
        if failed := {rank: text for rank, (text, _) in enumerate(said) if text is not None}:
            file = worker_file(path, save, self._rank)
            self.writes.when_written(file, partial(self._forget, path, save))
            if error is not None:
                raise error
            raise CheckpointError(f"{path} was not saved: {listing(failed)}.")
        return [value for _, value in said]

    def _write_main(
        self, checkpoint: dict[str, Any], path: str, save: str, hosts: list[str], options: Any
    ) -> None:
        def is_written() -> None:
            self._replace(path, save)
            self._made(path, save)

        write = Write(
            before=partial(self._await_parts, path, save, hosts),
            failed=partial(self._forget, path, save),
            after=is_written,
        )
        self.writes.save(checkpoint, path, options, write)

    def _await_parts(self, path: str, save: str, hosts: Sequence[str]) -> None:
        """Wait until this worker sees the files of all; not where names are not those of files."""
        files = {rank: worker_file(path, save, rank) for rank in range(len(hosts))}
        if not files or not is_there(files[0]):
            return
        began = time.monotonic()
        while missing := [rank for rank, file in files.items() if not is_there(file)]:
            if self._given_up or time.monotonic() > began + self._patience:
                self._given_up = self.writes.may_queue
                who = ", ".join(f"worker {rank} on {escape(hosts[rank])}" for rank in missing)
                raise CheckpointError(
                    f"{path} was not saved: worker 0 on {hosts[0]} does not see what {who} wrote"
                    f" to {workers_folder(path)} (after {self._patience:g} s). Save to a folder"
                    " that all machines share, such as one on a network file system:"
                    " ModelCheckpoint(dirpath=...) or Trainer(default_root_dir=...)."
                )
            time.sleep(_POLL_SECONDS)

    def _forget(self, path: str, save: str) -> None:
        """Remove what a save left that failed."""
        asked = self._asked.get(path, [])
        if save in asked:
            asked.remove(save)
        with suppress(OSError):  # remote, or another worker was faster
            self.writes.storage.remove_checkpoint(worker_file(path, save, self._rank))
        remove_saves(self.writes.storage, path, lambda other: other == save, unfinished=False)

    def _replace(self, path: str, save: str) -> None:
        """Remove the files of all saves before this one, which is in place."""
        asked = self._asked.get(path, [])
        self._asked[path] = asked[asked.index(save) :] if save in asked else []
        kept = {save, *self._asked[path]}
        remove_saves(self.writes.storage, path, lambda other: other not in kept)

    def save_center_only(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any = None
    ) -> None:
        """Write the main file alone, by worker 0; whoever resumes from it starts at the center."""
        if self._rank == 0:
            save = uuid.uuid4().hex[:12]
            self._asked.setdefault(path, []).append(save)
            write = Write(after=partial(self._replace, path, save))
            self.writes.save(checkpoint, path, storage_options, write)

    def remove(self, path: str) -> None:
        """Remove a checkpoint and the workers' files, the main file first."""
        if self._rank == 0:
            asked = self._asked.pop(path, [])
            self.writes.when_written(path, partial(self._remove_all, path, asked))

    def _remove_all(self, path: str, asked: Sequence[str]) -> None:
        self.writes.storage.remove_checkpoint(path)
        newer = {save for save in self._asked.get(path, []) if save not in asked}
        remove_saves(self.writes.storage, path, lambda save: save not in newer)


def worker_state(
    checkpoint: Mapping[str, Any],
    *,
    save: str,
    rank: int,
    exchange: Exchange,
    weights: dict[str, Any],
) -> WorkerState:
    """What one worker alone holds, in whose exchange nothing is in flight.

    Args:
        checkpoint: Lightning's, as this worker dumped it.
        save: to which it belongs.
        rank: of this worker.
        exchange: of this worker.
        weights: of OwnValues.
    """
    lightnings = {k: v for k, v in checkpoint.items() if k not in SHARED}
    return WorkerState(
        save=save,
        worker=rank,
        checkpoint=lightnings if rank > 0 else {},
        weights=weights,
        random=random_state(),
        **exchange.own_state(),
    )


def digest_of_main(checkpoint: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """A digest of what could be damaged unnoticed: weights, optimizers' states and our entry."""
    content = [checkpoint.get("state_dict"), checkpoint.get("optimizer_states")]
    content.append({key: value for key, value in entry.items() if key != "digest"})
    return fingerprint(content)[1]


def listing(problems: Mapping[int, str]) -> str:
    """What is wrong on which worker, in a line."""
    return "; ".join(f"worker {rank}: {quote(text)}" for rank, text in problems.items())


def describe(error: BaseException) -> str:
    """An error of this worker's, for the others."""
    return f"{type(error).__name__} on {platform.node()}: {error}"
