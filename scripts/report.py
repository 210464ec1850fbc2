"""Report on several runs: a table, pictures over τ, β and bytes, and a setting to take.

    python scripts/report.py multirun/2026-11-29/09-46-33
    python scripts/report.py outputs/2026-11-29 multirun/2026-11-28/17-02-11 --metric val/loss

A folder may be that of a sweep, of a run, or one above several. All is read from what the runs of
train.py have stored, and can be drawn again at any time.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import sweeping
from reporting import runs as reading
from reporting.settings import choose, choose_metric, group

_NOTHING = "Nothing is recommended: there is no setting all of whose runs have a result and bytes."


def main() -> None:
    """Parse the command line, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of runs")
    parser.add_argument(
        "--metric", help="the number to compare by; default: the first tested that is no loss"
    )
    parser.add_argument(
        "--better", choices=("max", "min"), help="which way it is better; default: by its name"
    )
    parser.add_argument(
        "--out", type=Path, help="where all is written; default: report in the first FOLDER"
    )
    options = parser.parse_args()
    try:
        report(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def report(options: argparse.Namespace) -> None:
    """Print and write all there is.

    Raises:
        ValueError: there is nothing to report on.
    """
    runs = reading.find(options.folders)
    metric = choose_metric(runs, options.metric, options.better)
    settings = group(runs, metric)
    choice = choose(settings, metric)
    out = options.out or options.folders[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    rows = reading.table(runs)
    with (out / "runs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(sweeping.aligned([row[:-1] for row in rows]))

    from reporting import heat_map, pareto

    chosen = choice.setting if choice else None
    pictures = {}
    if any(setting.reached and setting.megabytes for setting in settings):
        pictures["bytes"] = pareto.draw(settings, metric, chosen)
    panels = heat_map.panels(settings)
    if panels:
        pictures["tau_beta"] = heat_map.draw(panels, metric)
    notes = list(reading.notes(runs))
    notes += [f"no run: {cell}" for panel in panels for cell in panel.missing()]
    if len(panels) > heat_map.MOST:
        notes.append(f"tau_beta has the first {heat_map.MOST} of {len(panels)} panels.")
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
        figure.savefig(out / f"{name}.svg")
    (out / "recommended.json").write_text(json.dumps(_plain(choice, metric), indent=2))
    if notes:
        print("\nMissing, or not alike:", *(f"  {note}" for note in notes), sep="\n")
    print(f"\n{choice.text if choice else _NOTHING}\n")
    print(f"  {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _plain(choice: Any, metric: Any) -> dict[str, Any]:
    found = {"metric": metric.name, "better": metric.better, "setting": None, "text": None}
    return found | ({"setting": choice.setting.values, "text": choice.text} if choice else {})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
