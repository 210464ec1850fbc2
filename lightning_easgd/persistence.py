"""Checkpoints as Lightning asks a strategy for them: the center, and beside it every worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_easgd.checkpoint import Resumed, WorkerCheckpoints
from lightning_easgd.checkpoint_io import AtomicCheckpointIO
from lightning_easgd.collectives import CollectiveStrategy
from lightning_easgd.internals import WrappingCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Mapping


class PersistentStrategy(CollectiveStrategy):
    """Saves and restores the exchange that a subclass sets up.

    Args:
        strict_resume: whether it is an error if the own state of a worker is missing or damaged in
            the checkpoint that training resumes from.
        **options: of CollectiveStrategy.
    """

    def __init__(self, *, strict_resume: bool, **options: Any) -> None:
        super().__init__(**options)
        self._strict_resume = strict_resume
        self._resumed: Resumed | None = None

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
        """Write the center, and beside it every worker's own state; see checkpoint.py.

        After an exception that one worker may be alone with, and for weights only, the center.
        """
        path, exchange = os.fspath(filepath), self._exchange
        weights_only = "optimizer_states" not in checkpoint
        if exchange is None or self._alone or weights_only:
            self._checkpoints().save_center_only(checkpoint, path, storage_options)
        else:
            self._checkpoints().save(
                checkpoint, path, exchange=exchange, storage_options=storage_options
            )

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self._checkpoints().remove(os.fspath(filepath))

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if weights_only is None and os.fspath(checkpoint_path).startswith(("http://", "https://")):
            weights_only = True  # Lightning's default is not, there
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        module = self.lightning_module
        if module is not None and module.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = self._checkpoints().resume(
                checkpoint,
                os.fspath(checkpoint_path),
                weights_only=weights_only,
                strict=self._strict_resume,
                groups=self._arranged_groups(),
                tied=self.options.tied is not None,
            )
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        # While training is set up already, as the learning-rate finder does when it is done.
        if self._exchange is not None:
            self._exchange.read_module()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self._resumed is None:
            return
        assert self._exchange is not None
        self._resumed.restore(self._exchange)
        rank_zero_info(self._resumed.note(self.world_size))
        for warning in self._resumed.warnings():
            rank_zero_warn(warning)

    def _checkpoints(self) -> WorkerCheckpoints:
        return WorkerCheckpoints(
            self.checkpoint_io, rank=self.global_rank, workers=self.world_size, gather=self._collect
        )
