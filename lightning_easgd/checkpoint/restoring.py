"""How the workers go on from a checkpoint: all from the same, and each with its own state.

[Note: agreement] Lightning resolves ``ckpt_path="last"`` and reads the file on each worker by
itself. A worker whose machine does not see the folder, or sees another file, would go on without
the others. So all of them first say what they found; an error is everybody's.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_easgd.center.digest import fingerprint
from lightning_easgd.checkpoint.files import ENTRY, Storage, is_save_id, worker_file
from lightning_easgd.checkpoint.resumed import Resumed
from lightning_easgd.checkpoint.state import FORMAT, SharedState, WorkerState
from lightning_easgd.checkpoint.worker_checkpoints import (
    CheckpointError,
    Gather,
    digest_of_main,
    listing,
)
from lightning_easgd.communication.foreign import escape, quote

_VERSION = "pytorch-lightning_version"


def agree_on_path(path: str | None, gather: Gather, *, looked_in: Sequence[str] = ()) -> None:
    """Make sure that all workers have a checkpoint to go on from, or none.

    Args:
        path: of this worker; None where it found none.
        gather: collects a plain value of every worker, by rank.
        looked_in: folders, if it found none.

    Raises:
        CheckpointError: on all workers, with what each found where.
    """
    said = gather([platform.node(), path, list(looked_in)])
    found = {rank: place for rank, (_, place, _) in enumerate(said) if place}
    if not found or len(found) == len(said):
        return
    texts = [
        f"worker {rank} on {escape(host)} found {escape(place or ' in '.join(['none', *folders]))}"
        for rank, (host, place, folders) in enumerate(said)
    ]
    folders = sorted({escape(os.path.dirname(place)) or "." for place in found.values()})
    raise CheckpointError(
        f"Not all workers found a checkpoint to go on from: {'; '.join(texts)}. All machines must"
        f" see the folder {', '.join(folders)}: save to a network file system, or copy it to the"
        " same place on each machine. Or start anew on all with ckpt_path=None."
    )


class Restorer:
    """Reads a checkpoint on all workers.

    Args:
        storage: how files are read, on this worker.
        rank: this worker.
        gather: collects a plain value (as JSON has) of every worker on every worker, by rank.
    """

    def __init__(self, storage: Storage, *, rank: int, gather: Gather) -> None:
        self._storage = storage
        self._rank = rank
        self._gather = gather

    def read(
        self, path: str, read: Callable[[], Any], *, weights_only: bool | None, own: bool = True
    ) -> Found:
        """Read the main file and this worker's own state; all must call it.

        Args:
            path: of the main file.
            read: reads it.
            weights_only: as the user asked for the main file.
            own: whether the worker's own state is wanted.

        Raises:
            CheckpointError: on all workers, if one cannot read the main file, or it is damaged, of
                another layout, or not the same for all.
        """
        found, error = Found(path, {}, None, None, None), None
        try:
            checkpoint, entry = _read_main(path, read)
            mine, problem = None, None
            if entry is not None and own:
                mine, problem = self.load_own(entry, path, weights_only=weights_only)
            found = Found(path, checkpoint, entry, mine, problem)
        except CheckpointError as raised:
            error = raised
        text = None if error is None else str(error)
        said = self._gather(
            [platform.node(), text, f"{path} ({found.name})", found.save, found.step]
        )
        _require_readable(path, said, error)
        return found

    def resume(
        self,
        found: Found,
        *,
        strict: bool,
        groups: Sequence[Sequence[Sequence[int]]] = (),
        tied: bool = False,
    ) -> Resumed | None:
        """Put this worker's own state in the place of worker 0's; all must call it.

        Args:
            found: by :meth:`read`; its checkpoint becomes what this worker restores.
            strict: whether a worker that cannot have its own state is an error.
            groups: ranks of all groups, level by level from the outermost inward; those of one of
                the innermost go on together or not at all.
            tied: whether each has a center of its own.

        Returns:
            None for a checkpoint without workers' states, written by another strategy.

        Raises:
            CheckpointError: on all workers, with ``strict``, if the state of one is missing or
                damaged.
        """
        entry, own = found.entry, found.own
        if entry is None:
            return None
        said = self._gather(found.problem)
        ranks = range(len(said)) if len(said) > 1 else [self._rank]  # it knows of itself alone
        problems = {rank: text for rank, text in zip(ranks, said, strict=True) if text}
        changed = (entry.groups, entry.tied) != (list(groups), tied)
        problems |= _problems_of_groups(groups[-1] if groups else [], problems, changed=changed)
        own = None if self._rank in problems else own
        if problems and strict:
            raise CheckpointError(
                f"Not all workers have their own state in {found.path}: {listing(problems)}. Leave"
                " strict_resume at False to start those at the center."
            )
        if own is None:
            _start_afresh(found.checkpoint)
        else:
            found.checkpoint.update(own.checkpoint)
            own = replace(own, checkpoint={})  # as large as the worker's optimizers
        return Resumed(found.path, entry, own, problems)

    def load_own(
        self, entry: SharedState, path: str, *, weights_only: bool | None
    ) -> tuple[WorkerState | None, str | None]:
        """This worker's own state; None, and why, where it should have had one.

        Args:
            entry: of the main file.
            path: of the main file.
            weights_only: as of :meth:`read`.
        """
        if self._rank >= entry.workers:
            return None, None
        # A link (ModelCheckpoint's save_last="link") points to a main file with another name.
        target = os.path.realpath(path) if os.path.islink(path) else path
        file = worker_file(target, entry.save, self._rank)
        try:
            if entry.own is not None:  # it was one worker
                return WorkerState.read(entry.own), None
            content = self._storage.load_checkpoint(file, weights_only=weights_only)
            own = WorkerState.read(content)
            if (own.save, own.worker) != (entry.save, self._rank):
                of = f"worker {own.worker} in save {own.save}"
                return None, f"{file} is that of {of}, not of {self._rank} in {entry.save}"
            digest = content.pop("digest", None)  # of a worker at its own pace
            if self._rank < len(entry.parts):
                digest = entry.parts[self._rank]
            if list(fingerprint(content)) != list(digest or ()):
                return None, f"{file} was altered since it was written"
        except FileNotFoundError as missing:
            return None, f"{missing}".rstrip(".")
        except Exception as broken:  # whatever a storage raises on a damaged file
            return None, f"{file} cannot be read ({_reason(broken)})"
        return own, None


@dataclass(frozen=True)
class Found:
    """What this worker read of a checkpoint."""

    path: str
    checkpoint: dict[str, Any]
    entry: SharedState | None
    own: WorkerState | None
    problem: str | None
    """Why the worker has no state of its own where it should have."""

    @property
    def save(self) -> str | None:
        """The id of the save; None: it is another strategy's."""
        return None if self.entry is None else self.entry.save

    @property
    def step(self) -> int | None:
        """Optimizer steps taken."""
        step = self.checkpoint.get("global_step")
        return step if isinstance(step, int) else None

    @property
    def name(self) -> str:
        """The save, in words."""
        return f"save {self.save}, step {self.step}"


def _read_main(path: str, read: Callable[[], Any]) -> tuple[dict[str, Any], SharedState | None]:
    """The main file's content without our entry, and the entry; None if there is none."""
    try:
        checkpoint = read()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there ({error})") from error
    except Exception as error:  # whatever a storage raises on a damaged file
        raise CheckpointError(
            f"{path} cannot be read ({_reason(error)}). It is damaged, cut short or no checkpoint;"
            " resume from another one, or remove it to start anew"
        ) from error
    if not isinstance(checkpoint, dict) or _VERSION not in checkpoint:
        held = list(checkpoint)[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(
            f"{path} is no checkpoint of Lightning's: it holds {held} and no '{_VERSION}'. Load"
            " weights alone with module.load_state_dict before fit"
        )
    entry = checkpoint.pop(ENTRY, None)
    return checkpoint, None if entry is None else _read_entry(path, checkpoint, entry)


def _read_entry(path: str, checkpoint: Mapping[str, Any], entry: Any) -> SharedState:
    way_out = (
        "resume from another checkpoint, or remove the entry"
        f" '{ENTRY}' from this one to start all workers at its weights"
    )
    layout = entry.get("format") if isinstance(entry, Mapping) else None
    if layout != FORMAT:
        raise CheckpointError(
            f"{path} has layout {layout}, this version of lightning-easgd reads {FORMAT}. Use the"
            f" version that wrote it; {way_out}"
        )
    if not is_save_id(entry.get("save")):
        raise CheckpointError(
            f"{path} names its save {str(entry.get('save'))[:80]!r}, which is no id of a save (12"
            f" hexadecimal digits). It is damaged or was made up; {way_out}"
        )
    if digest_of_main(checkpoint, entry) != entry.get("digest"):
        raise CheckpointError(
            f"{path} is damaged: its weights, optimizer states or the entry '{ENTRY}' are not those"
            f" that were written. If they were changed on purpose, remove the entry; {way_out}"
        )
    try:
        return SharedState.read(entry)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not complete: {error}. Use the version that wrote it; {way_out}"
        ) from error


def _require_readable(path: str, said: Sequence[Any], mine: CheckpointError | None) -> None:
    failed = {rank: text for rank, (_, text, *_) in enumerate(said) if text is not None}
    if failed:
        if len(failed) == len(said) and len(set(failed.values())) == 1:
            raise CheckpointError(f"{mine}.") from mine
        who = "; ".join(
            f"worker {rank} on {escape(said[rank][0])}: {quote(text)}"
            for rank, text in failed.items()
        )
        raise CheckpointError(f"Not all workers can read the checkpoint {path}: {who}.") from mine
    if len({(save, step) for *_, save, step in said}) > 1:
        who = "; ".join(
            f"worker {rank} on {escape(host)} read {escape(what)}"
            for rank, (host, _, what, *_) in enumerate(said)
        )
        raise CheckpointError(
            f"The workers read different checkpoints: {who}. Let all machines see the"
            " same folder, or copy the newest checkpoint, with its folder, to each."
        )


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


def _reason(error: BaseException) -> str:
    """An error in a line; torch's about what it does not unpickle have many."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    if type(error).__name__ == "UnpicklingError":
        text += " (fit(..., weights_only=False) unpickles anything, for whoever trusts the file)"
    return text


def _start_afresh(checkpoint: dict[str, Any]) -> None:
    """Keep worker 0's learning rates and progress, but none of its moments."""
    checkpoint["optimizer_states"] = [
        {**state, "state": {}} for state in checkpoint.get("optimizer_states", [])
    ]
