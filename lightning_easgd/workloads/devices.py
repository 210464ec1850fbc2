"""The device of a single-process run, from the name Lightning gives its accelerator."""

import torch


def single_device(accelerator: str) -> torch.device:
    """Device on which one process trains under `Trainer(accelerator=accelerator)`.

    Args:
        accelerator: "cpu", "gpu", "cuda", "mps", or "auto" (CUDA, else MPS, else the CPU).

    Returns:
        The first device of that kind.

    Raises:
        ValueError: If the accelerator is none of these.
    """
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() or torch.mps.is_available() else "cpu"
    if accelerator == "gpu":
        accelerator = "cuda" if torch.cuda.is_available() or not torch.mps.is_available() else "mps"
    if accelerator not in {"cpu", "cuda", "mps"}:
        raise ValueError(
            f"strategy=single got trainer.accelerator={accelerator!r}; allowed are cpu, gpu, cuda, "
            "mps and auto. Choose one of them, or another strategy."
        )
    return torch.device(accelerator, 0) if accelerator == "cuda" else torch.device(accelerator)
