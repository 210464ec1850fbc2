"""The server that worker 0 starts for all workers of one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_ENDING = 10.0
"""Seconds that it has to end when all workers have left."""

_MAIN = """
import sys, types
package = sys.modules["lightning_easgd"] = types.ModuleType("lightning_easgd")
package.__path__ = [sys.argv.pop(1)]
from lightning_easgd.server.local import main
main()
"""
"""Without the package's own imports: Lightning takes three times as long as all that is needed."""

_running: list[subprocess.Popen[str]] = []
"""Servers that other workers still need, so that nobody asks for their ends."""


class LocalServer:
    """A server in a process of its own, which others on this machine may outlive this one with.

    Args:
        **settings: of the server, as plain data.
    """

    def __init__(self, **settings: Any) -> None:
        package = str(Path(__file__).parent.parent)
        command = [sys.executable, "-c", _MAIN, package, json.dumps(settings)]
        # In a session of its own: Ctrl-C is for the workers, which still want to send.
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        _running.append(self._process)

    def address(self) -> str:
        """Of the server, when it answers.

        Raises:
            RuntimeError: it did not start.
        """
        assert self._process.stdout is not None
        with self._process.stdout as said:
            port = said.readline().strip()
        if not port:
            raise RuntimeError(
                f"The server of the center did not start (exit code {self._process.wait()}). Its"
                " error is above. Is there memory for another process, and gRPC: pip install"
                " -e '.[async]'?"
            )
        return f"127.0.0.1:{port}"

    def leave(self) -> None:
        """Let it end; it does when the others have left, too, or are silent."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING)
            _running.remove(self._process)

    def end(self) -> None:
        """End it now, before this worker has joined; the others find no server then."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.kill()
        self.leave()
