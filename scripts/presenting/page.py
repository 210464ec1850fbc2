"""Writes report.html and its figures from results and from what is known of how they came about."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from comparing.result import Result
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from presenting import figures, style, tables
from presenting.against import Against
from presenting.difference import ENOUGH
from presenting.entries import Entry, entries_of, tested
from presenting.score import Score, score_of
from presenting.sentence import always_reaches, choose, limit, sentence
from presenting.times import step_times
from presenting.words import bits, counted, duration

NAME, FIGURES = "report.html", "figures"
PRICES = {"hour": 1.0, "gigabyte": 0.02}
"""Of a machine for an hour, and of a GB that it sends; a reader sets their own."""
TRAININGS = 1000
"""Trainings that the page shows the price of, at first."""
_NEEDED = ("network", "metric", "lower_is_better", "target", "baseline", "titles", "seeds")


def write_page(results: Sequence[Result], about: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html into a folder, and its figures as PNG and SVG into one beside it.

    Args:
        results: all that are stored, those of the tuning and those that failed, too.
        about: what about.json says of them.
        folder: that is there.

    Returns:
        The page.

    Raises:
        ValueError: there are no results, or they are of another version.
    """
    if missing := [name for name in _NEEDED if name not in about]:
        raise ValueError(
            f"about.json is missing or of another version: it lacks {', '.join(missing)}. Train"
            " with this version, into another folder."
        )
    score = score_of(about["metric"], lower_is_better=about["lower_is_better"])
    entries = entries_of(results, about, score)
    baseline = _baseline(entries, about["baseline"])
    target = about["target"]
    rows = [Against(entry, baseline, score, target) for entry in entries]
    pictures = folder / FIGURES
    pictures.mkdir(exist_ok=True)
    for old in (*pictures.glob("*.png"), *pictures.glob("*.svg")):
        old.unlink()  # of results that are there no more
    with style.styled():
        drawn = dict(_figures(rows, baseline, about, score, pictures))
    page = folder / NAME
    page.write_text(_render(_context(rows, baseline, about, score) | {"figures": drawn}))
    return page


def _baseline(entries: Sequence[Entry], name: str | None) -> Entry | None:
    return next((entry for entry in entries if entry.contender == name), None)


def _context(
    rows: Sequence[Against], baseline: Entry | None, about: Mapping[str, Any], score: Score
) -> dict[str, Any]:
    """All that the template shows, but for the figures."""
    entries = [row.entry for row in rows]
    wanted = about["titles"].get(about["baseline"], about["baseline"])
    known = [(row, found) for row, found in tables.break_evens(rows)]
    target, chosen = about["target"], choose(rows)
    return {
        "sentence": sentence(rows, baseline=wanted),
        "soonest": bool(chosen and always_reaches(chosen)),
        "others": sum(bool(row.final) and not row.is_baseline for row in rows),
        "baseline": baseline.label if baseline else wanted,
        "goal": None if target is None else score.goal(target),
        "score": score,
        "enough": ENOUGH,
        "numbers": tables.three_numbers(rows),
        "money": tables.money(rows),
        "money_to_target": any(row.seconds for row in rows),
        "prices": PRICES,
        "trainings": TRAININGS,
        "break_even": [tables.break_even_row(*each) for each in known],
        "compute": known[0][1].compute if known else None,
        "steps": tables.steps(step_times(entries)),
        "facts": dict(_facts(entries, about)),
        "tuning": tables.tuning(entries, score),
        "failures": [*tables.failures(entries, about, score)],
        "tuned_apart": any(
            run.tuning for e in entries for r in e.tried.values() for run in r.values()
        ),
        "emulated": about["network"] not in (None, "cluster"),
        "network": about["network"] and limit(about["network"]),
        "at_once": (about.get("configuration") or {}).get("parallel") or 1,
        "spacing": _spacing(entries),
        "few": min((len(e.finished) for e in entries if e.finished), default=0) < ENOUGH,
    }


def _figures(
    rows: Sequence[Against],
    baseline: Entry | None,
    about: Mapping[str, Any],
    score: Score,
    folder: Path,
) -> Iterator[tuple[str, Markup]]:
    """All figures that the results have the numbers for, by name."""
    entries, target = [row.entry for row in rows], about["target"]
    look = style.looks([entry.label for entry in entries], baseline and baseline.label)
    epoch = figures.epoch_of(entries, about.get("epochs"))
    axes = (
        figures.time_axis(entries),
        figures.samples_axis(),
        figures.bytes_axis(entries),
    )
    found = {
        f"error_over_{axis.name}": figures.error_curve(entries, axis, score, target, look)
        for axis in axes
    }
    found["gap_over_epochs"] = figures.gap_curve(entries, baseline, epoch, score, look)
    found["score_over_period"] = figures.period_curve(entries, baseline, score)
    found["distance"] = figures.distance_curve(entries, look)
    found["time_per_step"] = figures.step_bars(step_times(entries))
    chosen = choose(rows)
    for row, even in tables.break_evens(rows):
        if row is chosen or "bandwidth" not in found:
            found["bandwidth"] = figures.bandwidth_curve(even, look)
    for name, figure in found.items():
        if figure is not None:
            yield name, Markup(style.write(figure, folder, name))


def _facts(entries: Sequence[Entry], about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How it was measured."""
    machine = about.get("machine") or {}
    yield (
        "machine",
        ", ".join(
            str(value)
            for value in (
                machine.get("name"),
                machine.get("cpu"),
                machine.get("cores") and counted(machine["cores"], "core"),
                machine.get("system"),
            )
            if value
        )
        or "not recorded",
    )
    yield "hosts of workers", ", ".join(_hosts(entries)) or "not recorded"
    yield "network", _network(about["network"])
    yield "rate of the link, measured before each run", _link(entries)
    yield (
        "module and data",
        " on ".join(str(about[key]).split(".")[-1] for key in ("model", "data") if about.get(key)),
    )
    yield "epochs", str(about.get("epochs", "not recorded"))
    yield "seeds", ", ".join(map(str, about["seeds"]))
    yield "distance of tests", _spacing(entries) or "one test only, at the end"
    versions = about.get("versions") or {}
    yield "versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or "not recorded"
    yield "commit", str(about.get("commit") or "not recorded")
    yield "started", str(about.get("started") or "not recorded")
    yield "command", str(about.get("command") or "not recorded")


def _hosts(entries: Sequence[Entry]) -> list[str]:
    runs = [run for entry in entries for run in entry.runs.values()]
    return sorted({worker.host for run in runs for worker in run.workers})


def _network(name: str | None) -> str:
    if name is None:
        return "none: all workers on one machine, nothing limited"
    if name == "cluster":
        return "that of the cluster"
    return f"emulated on one machine: hosts {limit(name)} each way"


def _link(entries: Sequence[Entry]) -> str:
    rates = [r.link_rate for entry in entries for r in entry.runs.values()]
    known = [rate for rate in rates if rate is not None]
    if not known:
        return "not measured"
    text = (
        f"{bits(statistics.median(known))} in the median, {bits(min(known))} to {bits(max(known))}"
    )
    lost = len(rates) - len(known)
    return text + (f"; not measured before {counted(lost, 'run')}" if lost else "")


def _spacing(entries: Sequence[Entry]) -> str:
    """Of tests, which is the resolution of a time to the target."""
    spans = {}
    for entry in entries:
        apart = [
            after.seconds - before.seconds
            for run in entry.finished.values()
            for before, after in pairwise(tested(run))
        ]
        if apart:
            spans[entry.label] = statistics.median(apart)
    return "; ".join(f"{label} {duration(seconds)}" for label, seconds in spans.items())


def _render(context: Mapping[str, Any]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("page.html").read_text()
    return environment.from_string(source).render(context)
