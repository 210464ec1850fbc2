"""Work that goes on beside training in a thread of its own, and on a GPU in a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def in_background(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Start ``work``; what is returned waits for it and raises what it raised.

    Args:
        work: uses tensors as they are now; nobody else may touch them before it is waited for.
        device: where they lie.
    """
    errors: list[BaseException] = []
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))

    def run() -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(stream):
                work()
        except BaseException as error:
            errors.append(error)

    # A daemon: if a worker is gone, an error elsewhere must not wait for what never arrives.
    thread = threading.Thread(target=run, name="easgd-sum", daemon=True)
    thread.start()

    def wait() -> None:
        thread.join()
        if errors:
            raise errors[0]
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)

    return wait
