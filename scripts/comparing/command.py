"""What scripts that compare contenders do at their beginning and end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from emulation import EmulationError

from comparing.contender import FOLDER, named


def require_contenders(arguments: Sequence[str]) -> None:
    """End with a line if a contender is typed that there is not; Hydra would not say which are."""
    try:
        named(arguments, FOLDER)
    except ValueError as error:
        sys.exit(f"error: {error}")


def end_with_result_of(run: Callable[[], bool], stopped: str) -> None:
    """Run, and end the process with 1 if something failed, and with 130 if Ctrl-C stopped it.

    Args:
        run: whether nothing failed.
        stopped: what is said where it was stopped.
    """
    try:
        if not run():
            sys.exit(1)
    except (ValueError, EmulationError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\nStopped. {stopped}", file=sys.stderr)
        sys.exit(130)
