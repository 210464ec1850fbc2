"""Checkpoint files that are whole or absent, also where the temporary folder is another disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own, except that a local file is written beside its final name and then renamed.

    Lightning writes to the system's temporary folder and moves the file, which copies it, in steps
    that a crash can cut short, where that folder lies on another file system. Written straight to
    the disk, a checkpoint also takes no second copy in memory. Remote paths are left to Lightning.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        name = os.fspath(path)
        if storage_options is not None or "://" in name:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        part = f"{name}.part"
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, name)
        except BaseException:
            if os.path.exists(part):
                os.remove(part)
            raise
