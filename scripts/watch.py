"""Watch a run that is under way, or see how one ended, from the files in its folder alone.

    python scripts/watch.py outputs/2026-11-29/09-46-33
    python scripts/watch.py outputs/2026-11-29/09-46-33 --once

The folder may be one that another machine writes to. The run must log with logger=csv, as it does
by default.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from seeing.screen import end, screen


def main() -> None:
    """Parse the command line, and show the run until it has ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--once", action="store_true", help="print once, and end")
    parser.add_argument("--seconds", type=float, default=2.0, help="between two looks")
    options = parser.parse_args()
    if not options.run.is_dir():
        sys.exit(f"error: {options.run} is no folder. Give the folder that a run writes to.")
    console = Console()
    if options.once:
        console.print(screen(options.run))
        return
    with Live(screen(options.run), console=console, auto_refresh=False) as live:
        while not end(options.run):
            time.sleep(options.seconds)
            live.update(screen(options.run), refresh=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
