"""Writes findings.md, the same as findings.html, and the figures, from what is stored alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from presenting import style
from presenting.entries import Entry
from presenting.words import counted

from reproducing.evidence import Evidence, Study
from reproducing.figures import FIGURES
from reproducing.findings import CONFIRMED, FINDINGS, NOT_CONFIRMED, NOT_TESTED, Finding, Verdict

NAME, FOLDER = "findings", "findings"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The paper's findings, repeated</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""
_STYLE = """body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 sans-serif; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .8rem 0; }
th, td { border: 1px solid #c9cacb; padding: .25rem .6rem; text-align: left; }
img { max-width: 100%; background: #fefefe; }
:root { color-scheme: light dark; }
"""


def write_page(studies: Sequence[Study], folder: Path) -> list[tuple[Finding, Verdict]]:
    """Write findings.html and findings.md into a folder, and figures into one of it.

    Args:
        studies: that ran.
        folder: that is there.

    Returns:
        What it says of each finding.

    Raises:
        ValueError: there is nothing to judge by.
    """
    evidence = Evidence.of(studies)
    judged = [(finding, finding.judge(evidence)) for finding in FINDINGS]
    context = _context(studies, evidence, judged) | {"folder": FOLDER}
    text = _render(context | {"figures": _draw(evidence, folder / FOLDER)})
    (folder / f"{NAME}.md").write_text(text)
    html = MarkdownIt().enable("table").render(text)
    (folder / f"{NAME}.html").write_text(_PAGE.format(style=_STYLE, body=html))
    return judged


def _draw(evidence: Evidence, folder: Path) -> dict[str, str]:
    """Captions of the figures that there is something to draw for."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.*"):
        old.unlink()  # of results that are there no more
    captions = {}
    with style.styled():
        for name, (caption, draw) in FIGURES.items():
            if (figure := draw(evidence)) is not None:
                style.write(figure, folder, name)
                captions[name] = caption
    return captions


def _context(
    studies: Sequence[Study], evidence: Evidence, judged: Sequence[tuple[Finding, Verdict]]
) -> dict[str, Any]:
    about = studies[0][1]
    configuration = about["configuration"]
    outcomes = Counter(verdict.outcome for _, verdict in judged)
    return {
        "findings": judged,
        "outcomes": {name: outcomes[name] for name in (CONFIRMED, NOT_CONFIRMED, NOT_TESTED)},
        "model": _class(configuration["model"]),
        "data": _class(configuration["data"]),
        "seeds": len(about["seeds"]),
        "guessing": f"{evidence.guessing:g}",
        "target": evidence.target,
        "facts": dict(_facts(about)),
        "runs": [_row(workers, entry) for (*_, workers), entry in evidence.entries.items()],
    }


def _facts(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    machine, data = about["machine"], about["configuration"]["data"]
    cores = counted(machine["cores"], "core")
    yield "machine", ", ".join(filter(None, (machine["cpu"], cores, machine["system"])))
    yield "versions", ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield "commit", str(about["commit"])
    yield "started", about["started"]
    yield "command", f"`{about['command']}`"
    model = about["configuration"]["model"].items()
    yield "network", ", ".join(f"{name} {value}" for name, value in model if name != "_target_")
    yield "passes of each worker over the training set", str(about["epochs"])
    yield "images per worker and step", str(data["batch_size"])
    yield "target", f"{about['target']} test accuracy" if about["target"] else "none"


def _row(workers: int, entry: Entry) -> list[str]:
    runs = entry.runs.values()
    return [
        entry.title,
        "-" if entry.tau is None else str(entry.tau),
        str(workers),
        ", ".join(f"{rate:g}" for rate in sorted(entry.tried)) or "one, as given",
        "-" if entry.rate is None else f"{entry.rate:g}",
        str(len(runs)),
        str(sum(run.diverged is not None for run in runs)),
        str(len(entry.failed)),
    ]


def _class(configuration: Mapping[str, Any]) -> str:
    return str(configuration["_target_"]).rpartition(".")[2]


def _render(context: Mapping[str, Any]) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = Path(__file__).with_name("findings.md").read_text()
    return environment.from_string(source).render(context)
