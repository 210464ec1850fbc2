"""Work that goes on beside training in a thread of its own, and on a GPU in a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Background:
    """A function that runs beside training; waited for like a collective.

    Args:
        function: uses tensors as they are now; nobody else may touch them before it is waited for.
        device: where they lie.
    """

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._error: Exception | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))
        # A daemon: the process may end while it waits for a worker that is gone.
        self._thread = threading.Thread(target=self._run, name="easgd-sum", daemon=True)
        self._thread.start()

    def is_completed(self) -> bool:
        """Whether the function has returned or raised."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the function; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._function()
        except Exception as error:
            self._error = error
