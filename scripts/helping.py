"""What --help prints: the usual commands, and every choice of every group with its comment."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from plugging import CONF

_MORE = """All else is KEY=VALUE. With --cfg job you see all keys and their values, for any choice
of groups; what they mean stands in conf/. Hydra's own options: --hydra-help"""


def text(title: str, commands: str, config: str) -> str:
    """The help of a script.

    Args:
        title: what it does.
        commands: the usual ones, each with what it is for.
        config: its file of conf/, without .yaml.
    """
    listed = [line for group, chosen in groups(config) for line in _listing(group, chosen)]
    return "\n".join([title, "", commands.rstrip(), "", *listed, _MORE])


def groups(config: str) -> Iterator[tuple[str, str | None]]:
    """What a script's file chooses files of, and which; None where it chooses none."""
    for entry in OmegaConf.load(CONF / f"{config}.yaml").defaults:
        if isinstance(entry, DictConfig):
            ((group, chosen),) = entry.items()
            if not str(group).startswith("override "):
                yield str(group), chosen
        elif entry != "_self_":
            yield from groups(str(entry))


def _listing(group: str, chosen: str | None) -> Iterator[str]:
    files = sorted((CONF / group).glob("*.yaml"))
    yield f"{group}={chosen or 'NAME'}"
    width = max(len(path.stem) for path in files)
    for path in files:
        yield f"  {path.stem:<{width}}  {_comment(path.read_text())}"
    yield ""


def _comment(text: str) -> str:
    """The sentence that a file begins with, as far as it stands on the first line."""
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    return re.split(r"\. (?=[A-Z])", lines[0].lstrip("# "))[0].rstrip(".:")
