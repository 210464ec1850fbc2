"""The tables of the page, a row for each entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from presenting.against import Against
from presenting.break_even import BreakEven, break_even
from presenting.difference import Spread, verdict
from presenting.entries import Entry, common_seeds, final, mean_cost, reached, tested
from presenting.score import Score
from presenting.times import StepTime
from presenting.words import amount, bits, counted, duration

NOT_COUNTED = "not counted"


def three_numbers(rows: Sequence[Against]) -> list[dict[str, Any]]:
    """Time, score and bytes of each entry, and what it saves or loses against the baseline."""
    return [_three(row) for row in rows]


def _three(row: Against) -> dict[str, Any]:
    score, runs = row.score, len(row.entry.runs)
    lost = runs - len(row.entry.finished)
    return {
        "label": row.entry.label,
        "is_baseline": row.is_baseline,
        "runs": f"{runs - lost} of {runs}, {lost} diverged" if lost else str(runs),
        "target": _to_target(row),
        "time_saved": _percent(row.time_saved),
        "bytes_saved": _percent(row.bytes_saved),
        "end_seconds": _several(row.all_seconds, duration),
        "end_time_saved": _percent(row.all_time_saved),
        "sent": _several(row.all_bytes, amount) if row.all_bytes else NOT_COUNTED,
        "end_bytes_saved": _percent(row.all_bytes_saved),
        "score": score.shown(row.final.mean) if row.final else "-",
        "spread": _deviation(row.final, score),
        "gain": _gain(row.gain, row),
        "equal_time": _gain(row.gain_at_equal_time, row),
    }


def _to_target(row: Against) -> str:
    if row.target is None or not row.final:
        return "-"
    if not row.seconds:
        return "not reached"
    some = row.seconds.count < row.final.count
    where = f" ({row.seconds.count} of {row.final.count} runs)" if some else ""
    return _several(row.seconds, duration) + where


def _several(spread: Spread, shown: Any) -> str:
    if not spread:
        return "-"
    return str(shown(spread.mean, spread.deviation))


def _percent(spread: Spread) -> dict[str, str]:
    return {"value": f"{spread.shown(1)} %" if spread else "-", "verdict": verdict(spread)}


def _gain(spread: Spread, row: Against) -> dict[str, str]:
    if row.is_baseline or not spread:
        return {"value": "-", "verdict": ""}
    # A score of which less is better changes the other way than it gains.
    change = Spread([-v for v in spread.values]) if row.score.lower_is_better else spread
    digits = row.score.digits
    points = " points" * (row.score.unit == "%")
    return {"value": change.shown(digits, signed=True) + points, "verdict": verdict(spread)}


def _deviation(spread: Spread, score: Score) -> str:
    if not spread or spread.deviation is None:
        return ""
    return f" ± {score.scale * spread.deviation:.{score.digits}f}"


def money(rows: Sequence[Against]) -> list[dict[str, Any]]:
    """Machine-hours and GB of each entry to the target, or of a whole run if nobody reached it."""
    to_target = any(row.seconds for row in rows)
    found = []
    for row in rows:
        seconds, sent = (row.seconds, row.bytes) if to_target else (row.all_seconds, row.all_bytes)
        workers = next((run.hosts for run in row.entry.runs.values()), 0)
        known = bool(seconds)
        found.append(
            {
                "label": row.entry.label,
                "hours": workers * seconds.mean / 3600 if known else None,
                "gigabytes": workers * sent.mean / 1e9 if sent else None,
                "missing": "" if known else "target not reached" if row.final else "no result",
            }
        )
    return found


def break_evens(rows: Sequence[Against]) -> list[tuple[Against, BreakEven]]:
    """Of all entries that it is known of."""
    return [(row, found) for row in rows if (found := break_even(row)) is not None]


def break_even_row(row: Against, found: BreakEven) -> dict[str, str]:
    """From which bandwidth on the baseline wins, and what the model says of what was measured."""
    return {
        "label": found.label,
        "if_hidden": _rate(found.if_hidden),
        "if_awaited": _rate(found.if_awaited),
        "model": _model(found),
        "measured": _measured(row, found),
    }


def _rate(rate: float | None) -> str:
    if rate is None:
        return "at any bandwidth"
    return "at none" if rate == float("inf") else f"from {bits(rate)} on"


def _model(found: BreakEven) -> str:
    if found.measured_rate is None:
        return "-"
    low, high = (found.ratio(found.measured_rate, hides=hides) for hides in (True, False))
    return f"{low:.2f} to {high:.2f}"


def _measured(row: Against, found: BreakEven) -> str:
    saved = row.time_saved if found.to_target else row.all_time_saved
    return f"{1 / (1 - saved.mean / 100):.2f}" if saved and saved.mean < 100 else "-"


def steps(times: Sequence[StepTime]) -> list[dict[str, str]]:
    """Milliseconds of a step."""
    return [
        {
            "label": time.label,
            "seconds": _milliseconds(time.seconds),
            "computing": _milliseconds(time.computing, time.estimated),
            "waited": _milliseconds(time.waited, time.estimated),
            "hidden": _milliseconds(time.hidden),
            "slowest": time.slowest or NOT_COUNTED,
        }
        for time in times
    ]


def _milliseconds(seconds: float | None, estimated: bool = False) -> str:
    if seconds is None:
        return NOT_COUNTED
    return f"{'~ ' if estimated else ''}{1e3 * seconds:.1f}"


def tuning(entries: Sequence[Entry], score: Score) -> list[dict[str, Any]]:
    """Which learning rates each entry tried, what they reached, and which was taken."""
    found = []
    for entry in entries:
        seeds = common_seeds(entry.tried)
        tried = [
            f"{_rate_name(rate)}: {_mean_score(runs, seeds, score)}"
            for rate, runs in sorted(entry.tried.items(), key=lambda item: item[0] or 0.0)
        ]
        taken = _rate_name(entry.rate) if entry.runs else "none"
        budget = counted(len(seeds) * len(entry.tried), "run") if entry.tried else "no run"
        found.append({"label": entry.label, "tried": tried, "taken": taken, "budget": budget})
    return found


def _rate_name(rate: float | None) -> str:
    return "its own" if rate is None else f"{rate:g}"


def _mean_score(runs: Mapping[int, Any], seeds: Sequence[int], score: Score) -> str:
    if not seeds:
        return "no seed in common"
    if any(final(runs[seed]) is None for seed in seeds):
        return "diverged"
    cost = mean_cost(runs, seeds, score)
    return score.shown(cost if score.lower_is_better else -cost)


def failures(entries: Sequence[Entry], about: Mapping[str, Any], score: Score) -> Iterator[str]:
    """What failed, diverged, did not reach the target, was not run, or was not counted."""
    seeds, target = about["seeds"], about["target"]
    known = {entry.contender for entry in entries}
    for name in (name for name in about["titles"] if name not in known):
        yield f"{about['titles'][name]}: no run"
    for entry in entries:
        for run in entry.failed:
            reason = (run.error or "").strip().splitlines() or ["no reason is known"]
            yield f"{entry.label}, seed {run.seed}: failed, {reason[-1]}"
        yield from _lost(entry, target, score)
        done = {*entry.runs, *(run.seed for run in entry.failed)}
        if missing := [seed for seed in seeds if seed not in done]:
            yield f"{entry.label}: no run with seed {', '.join(map(str, missing))}"
        yield from _uncounted(entry)


def _lost(entry: Entry, target: float | None, score: Score) -> Iterator[str]:
    for seed, run in entry.runs.items():
        if seed not in entry.finished:
            why = run.diverged or "its score is not finite"
            yield f"{entry.label}, seed {seed}: diverged, {why}"
        elif target is not None and not run.points:
            yield f"{entry.label}, seed {seed}: no tests are stored, so times are not known"
        elif target is not None and reached(run, target, score) is None:
            best = min((point.score for point in tested(run)), key=score.cost)
            yield (
                f"{entry.label}, seed {seed}: did not reach {score.goal(target)}; its best test"
                f" found {score.shown(best)}"
            )
        if run.restarts:
            yield (
                f"{entry.label}, seed {seed}: {counted(run.restarts, 'worker')} with weights that"
                " were not finite began again at the center"
            )


def _uncounted(entry: Entry) -> Iterator[str]:
    for name, of in (
        ("bytes sent", lambda run: run.sent_bytes),
        ("time of training", lambda run: run.seconds),
    ):
        if lost := [str(s) for s, run in entry.finished.items() if of(run) is None]:
            yield f"{entry.label}: {name} not counted with seed {', '.join(lost)}"
