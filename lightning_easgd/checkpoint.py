"""What is saved beside a checkpoint, by which worker, under which name, and how it is found again.

[Note: layout] The main file is an ordinary Lightning checkpoint whose weights are the center::

    last.ckpt                               the center, and what rank 0 always saves
    last.ckpt.workers/<save>/0.ckpt, ...    what each worker alone knows, written by itself
    last.ckpt.workers/<save>/manifest.ckpt  sizes and digests, written when all of them are there

The main file names the save it belongs to and is written last, so it only ever points to workers'
files that are complete; a save that is cut short leaves the files of the one before untouched.

[Note: nothing is in flight] Saving the center awaits the exchange in flight. Because overlap is
exact, awaiting it early changes no bit of what follows, so no sum needs to be stored.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol

from lightning_easgd.exchange import Exchange
from lightning_easgd.fingerprint import fingerprint
from lightning_easgd.random_state import random_state, restore_random_state

ENTRY = "lightning_easgd"
"""Key of the main file under which the save describes itself."""

FORMAT = 1
"""Version of the layout and of the entries."""

SUFFIX = ".workers"

_SHARED = {
    "state_dict",
    *("hyper_parameters", "hparams_name", "hparams_type"),
    *("datamodule_hyper_parameters", "datamodule_hparams_name", "datamodule_hparams_type"),
}
"""Entries of a Lightning checkpoint that all workers share; the rest is each worker's own."""

Gather = Callable[[Any], list[Any]]


class Storage(Protocol):
    """What is used of Lightning's CheckpointIO."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write a dictionary."""

    def load_checkpoint(self, path: Any, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a dictionary."""

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file or folder, if it is there."""


class CheckpointError(RuntimeError):
    """A worker could not write, or may not go on without, its part of a checkpoint."""


@dataclass(frozen=True)
class Written:
    """One worker's part of a save: bytes of tensors, digest of the content, or what went wrong."""

    size: int
    digest: str
    error: str | None = None


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds for this worker besides what Lightning restores."""

    shared: dict[str, Any]
    """The entry of the main file."""
    own: dict[str, Any] | None
    """The worker's own file; None where it starts at the center."""
    problems: dict[int, str]
    """Why workers that should have had a file start at the center, by rank."""

    def restore(self, exchange: Exchange) -> None:
        """Give the exchange, whose module holds the center, back what was saved of it."""
        exchange.load_state(self.shared["exchange"], self.own and self.own["exchange"])

    def restore_random_state(self) -> None:
        """Go on with the random numbers that would have come next."""
        if self.own is not None:
            restore_random_state(self.own["random"])

    def warnings(self) -> list[str]:
        """Which workers should have had a file and start at the center; a line each."""
        return [
            f"Worker {rank} starts at the center, with fresh optimizers: {problem}."
            for rank, problem in self.problems.items()
        ]

    def note(self, workers: int) -> str:
        """How ``workers`` workers go on with what was saved, in a line."""
        before = self.shared["workers"]
        if before == workers or len(self.problems) == workers:
            kept = workers - len(self.problems)
            return f"{kept} of {workers} worker(s) go on with their own state."
        rest = "the others start at the center" if workers > before else "the rest is dropped"
        return (
            f"{workers} worker(s) resume what {before} trained: the first {min(before, workers)}"
            f" keep their own state, {rest}; alpha is that of {workers} worker(s)."
        )


class WorkerCheckpoints:
    """Saves and finds the workers' own states beside checkpoints.

    Args:
        storage: how files are written and read, on this worker.
        rank: this worker.
        workers: how many there are, p.
        gather: collects a value of every worker on every worker, in rank order.
    """

    def __init__(self, storage: Storage, *, rank: int, workers: int, gather: Gather) -> None:
        self._storage = storage
        self._rank = rank
        self._workers = workers
        self._gather = gather

    def save(
        self,
        checkpoint: dict[str, Any],
        path: str,
        *,
        exchange: Exchange,
        storage_options: Any = None,
    ) -> None:
        """Write a checkpoint and every worker's own state beside it; all workers must call it.

        Args:
            checkpoint: Lightning's, as this worker dumped it.
            path: of the main file; that of worker 0 counts, as under DDP.
            exchange: of this worker.
            storage_options: passed on to the storage.

        Raises:
            CheckpointError: another worker could not write its part; the main file is as it was.
        """
        exchange.drain()
        # A name may hold a score that every worker computed by itself.
        save, path = self._gather((uuid.uuid4().hex[:12], os.fspath(path)))[0]
        folder = f"{workers_folder(path)}/{save}"
        content = {
            "checkpoint": {key: v for key, v in checkpoint.items() if key not in _SHARED},
            "exchange": exchange.own_state(),
            "random": random_state(),
        }
        error = None
        try:
            self._storage.save_checkpoint(content, f"{folder}/{self._rank}.ckpt", storage_options)
            written = Written(*fingerprint(content))
        except Exception as raised:
            error = raised
            written = Written(0, "", f"{type(raised).__name__}: {raised}")
        parts = [Written(*part) for part in self._gather(astuple(written))]
        if error is not None:
            raise error
        _require_all(parts, path)
        if self._rank == 0:
            entry = {"format": FORMAT, "save": save, "workers": self._workers}
            entry["exchange"] = exchange.shared_state()
            self._finish({**checkpoint, ENTRY: entry}, path, parts, storage_options)

    def _finish(
        self,
        checkpoint: dict[str, Any],
        path: str,
        parts: list[Written],
        storage_options: Any,
    ) -> None:
        folder, save = workers_folder(path), checkpoint[ENTRY]["save"]
        manifest = {"format": FORMAT, "save": save, "workers": [asdict(part) for part in parts]}
        self._storage.save_checkpoint(manifest, f"{folder}/{save}/manifest.ckpt", storage_options)
        self._storage.save_checkpoint(checkpoint, path, storage_options)
        self._remove_stale(folder, keep=save)

    def save_center_only(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any = None
    ) -> None:
        """Write the main file alone, by worker 0; whoever resumes from it starts at the center."""
        if self._rank == 0:
            self._storage.save_checkpoint(checkpoint, path, storage_options)
            self._remove_stale(workers_folder(path), keep=None)

    def remove(self, path: str) -> None:
        """Remove a checkpoint and the workers' files, the main file first."""
        if self._rank == 0:
            self._storage.remove_checkpoint(path)
            self._storage.remove_checkpoint(workers_folder(path))

    def _remove_stale(self, folder: str, *, keep: str | None) -> None:
        # Listed on local file systems only; elsewhere the whole folder goes with its checkpoint.
        if os.path.isdir(folder):
            for name in os.listdir(folder):
                if name != keep:
                    self._storage.remove_checkpoint(f"{folder}/{name}")
            if keep is None:
                self._storage.remove_checkpoint(folder)

    def resume(
        self,
        checkpoint: dict[str, Any],
        path: str,
        *,
        weights_only: bool | None,
        strict: bool,
        groups: Sequence[Sequence[Sequence[int]]] = (),
        tied: bool = False,
    ) -> Resumed | None:
        """Find this worker's own state, and put it in the place of worker 0's; all must call it.

        Args:
            checkpoint: the main file's content; changed in place to what this worker restores.
            path: of the main file.
            weights_only: as the user asked for the main file.
            strict: whether a worker that cannot have its own state is an error.
            groups: ranks of all groups, level by level from the outermost inward; those of one of
                the innermost go on together or not at all.
            tied: whether each has a center of its own.

        Returns:
            None for a checkpoint without workers' states, written by another strategy.

        Raises:
            CheckpointError: on all workers, with ``strict``, if the state of one is missing or
                damaged; always, if the checkpoint was written by a newer version.
        """
        entry = checkpoint.pop(ENTRY, None)
        if entry is None:
            return None
        if entry["format"] > FORMAT:
            raise CheckpointError(
                f"{path} has layout {entry['format']}, this version reads up to {FORMAT}. Update"
                " lightning-easgd, or remove the entry 'lightning_easgd' to start all workers at"
                " the center."
            )
        own, problem = self._load_own(entry, path, weights_only)
        problems = {rank: text for rank, text in enumerate(self._gather(problem)) if text}
        before = entry["exchange"].get("groups", []), entry["exchange"].get("tied", False)
        changed = before != (list(groups), tied)
        problems |= _problems_of_groups(groups[-1] if groups else [], problems, changed=changed)
        own = None if self._rank in problems else own
        if problems and strict:
            raise CheckpointError(
                f"Not all workers have their own state in {path}: {_listing(problems)}. Leave"
                " strict_resume at False to start those at the center."
            )
        if own is None:
            _start_afresh(checkpoint)
        else:
            checkpoint.update(own.pop("checkpoint"))
        return Resumed(entry, own, problems)

    def _load_own(
        self, entry: Mapping[str, Any], path: str, weights_only: bool | None
    ) -> tuple[dict[str, Any] | None, str | None]:
        if self._rank >= entry["workers"]:
            return None, None
        # A link (ModelCheckpoint's save_last="link") points to a main file with another name.
        target = os.path.realpath(path) if os.path.islink(path) else path
        folder = f"{workers_folder(target)}/{entry['save']}"
        name = f"{self._rank}.ckpt"
        try:
            manifest = self._storage.load_checkpoint(
                f"{folder}/manifest.ckpt", weights_only=weights_only
            )
            content = self._storage.load_checkpoint(f"{folder}/{name}", weights_only=weights_only)
            expected = manifest["workers"][self._rank]
            if fingerprint(content) != (expected["size"], expected["digest"]):
                return None, f"{folder}/{name} was altered since it was written"
        except FileNotFoundError as missing:
            return None, f"{missing}".rstrip(".")
        except Exception as broken:  # whatever a storage raises on a damaged file
            reason = str(broken).splitlines()[0] if str(broken) else ""
            return None, f"{folder}/{name} cannot be read ({type(broken).__name__}: {reason})"
        return content, None


def workers_folder(path: str | os.PathLike[str]) -> str:
    """The folder of the workers' files beside the main file ``path``."""
    return os.fspath(path) + SUFFIX


def _require_all(parts: list[Written], path: str) -> None:
    failed = {rank: part.error for rank, part in enumerate(parts) if part.error is not None}
    if failed:
        raise CheckpointError(f"{path} was not saved: {_listing(failed)}.")


def _problems_of_groups(
    groups: Sequence[Sequence[int]], problems: Mapping[int, str], *, changed: bool
) -> dict[int, str]:
    """Workers that may not go on with their own state, since the others of their group cannot."""
    if changed:
        return dict.fromkeys((rank for ranks in groups for rank in ranks), "groups have changed")
    return {
        rank: f"worker {sick[0]} of its group does, since {problems[sick[0]]}"
        for ranks in groups
        if (sick := [rank for rank in ranks if rank in problems])
        for rank in ranks
        if rank not in problems
    }


def _listing(problems: Mapping[int, str]) -> str:
    return "; ".join(f"worker {rank}: {text}" for rank, text in problems.items())


def _start_afresh(checkpoint: dict[str, Any]) -> None:
    """Keep worker 0's learning rates and progress, but none of its moments."""
    checkpoint["optimizer_states"] = [
        {**state, "state": {}} for state in checkpoint.get("optimizer_states", [])
    ]
