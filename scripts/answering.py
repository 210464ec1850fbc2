"""What a script says of an error: one line, with what was probably meant."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from helping import groups
from hydra import compose, initialize_config_dir
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from launching import WorkerError, rank_of_worker
from omegaconf import DictConfig, OmegaConf
from plugging import CONF

FULL = os.environ.get("HYDRA_FULL_ERROR") == "1"
"""Whether the user asked to see tracebacks."""

_IN_OWN_WORDS = (
    *("ValueError", "TypeError", "FileNotFoundError", "MisconfigurationException"),
    "CheckpointError",
)
"""Errors whose text says enough without their type."""
_UNKNOWN_KEY = re.compile(r"Could not override '(.+?)'")


def explain(error: BaseException, config: str, arguments: Iterable[str]) -> str:
    """An error in one line.

    Args:
        error: what was raised.
        config: the file of conf/ that the script composes, without .yaml.
        arguments: of the command line.
    """
    error = cause(error)
    if isinstance(error, WorkerError):
        alike = in_words(str(error.outcome.error), error.outcome.message)
        return _line(alike if error.alike else str(error))
    if isinstance(error, MissingConfigException) and _is_choice(error):
        return _wrong_choice(error.missing_cfg_file or "", error.options or ())
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read: {_first_line(error)}. Write KEY=VALUE, and quotes"
            " around a value that has blanks or any of = , [ ] { } ( ) in it: 'KEY=\"VALUE\"'."
        )
    if isinstance(error, ConfigCompositionException):
        if found := _UNKNOWN_KEY.search(str(error)):
            return _wrong_key(found[1], config, arguments)
        return _line(f"{error} {error.__cause__ or ''}")
    return _line(in_words(type(error).__name__, str(error)))


def in_words(kind: str, text: str) -> str:
    """An error's text, with its type unless the text says enough."""
    return text if text and kind in _IN_OWN_WORDS else f"{kind}: {text}"


def cause(error: BaseException) -> BaseException:
    """What Hydra met when it made an object."""
    return error.__cause__ or error if isinstance(error, InstantiationException) else error


def write_traceback(error: BaseException, folder: Path) -> None:
    """Into ``error.log`` of a folder, or where this process writes if the user asked for it."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, WorkerError):
        text = error.outcome.trace
    if FULL or rank_of_worker():
        print(text, file=sys.stderr, flush=True)
    elif folder.is_dir():
        (folder / "error.log").write_text(text)


def _wrong_choice(file: str, options: Iterable[str]) -> str:
    group, _, name = file.rpartition("/")
    options = sorted(options)
    why = f"there is no such file.{_meant(f'{group}=', name, options)}"
    if group.startswith("hydra/"):
        why = "Hydra has no such plugin here. pip install -e '.[sweep]' brings some."
    allowed = f" Allowed: {', '.join(options)}" if options else ""
    return f"{group}={name} is not possible: {why}{allowed}"


def _is_choice(error: MissingConfigException) -> bool:
    """Whether a file of a group is missing, or a whole group that a plugin brings."""
    return bool(error.options) or (error.missing_cfg_file or "").startswith("hydra/")


def _wrong_key(key: str, config: str, arguments: Iterable[str]) -> str:
    known = OmegaConf.to_container(_composed(config, key, arguments), resolve=False)
    meant = _meant("", key, [*_keys(known), *(group for group, _ in groups(config))])
    return f"there is no key {key}.{meant} A new one needs a plus sign: +{key}=VALUE"


def _meant(prefix: str, given: str, allowed: Iterable[str]) -> str:
    close = get_close_matches(given, [*allowed], n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _composed(config: str, wrong: str, arguments: Iterable[str]) -> DictConfig:
    """What would have been composed without the wrong key, or without all that is typed."""
    right = [each for each in arguments if not each.startswith(("-", f"{wrong}="))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return compose(config, right)
        except HydraException:
            return compose(config)


def _keys(values: Any, above: str = "") -> Iterator[str]:
    for name, value in values.items() if isinstance(values, dict) else ():
        yield f"{above}{name}"
        yield from _keys(value, f"{above}{name}.")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def _line(text: str) -> str:
    return " ".join(text.split())
