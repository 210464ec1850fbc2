"""Configurations of runs, written without what only the environment should hold.

A password is kept out of files by ``${oc.env:PASSWORD}``. All else is resolved in what is written,
but this stays as it is, wherever it has got to, and is resolved by who reads the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, Node, OmegaConf
from omegaconf.resolvers import oc

_NAMES = "${oc.env:"


def save(cfg: DictConfig, path: Path) -> None:
    """Write a configuration as YAML, resolved but for the environment."""
    OmegaConf.save(OmegaConf.create(resolved(cfg)), path)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as plain data, resolved but for the environment."""
    with _environment_by_name():
        found: Any = OmegaConf.to_container(cfg, resolve=True)
    return found


@contextmanager
def _environment_by_name() -> Iterator[None]:
    _register(env=_name, decode=_decode_later)
    try:
        yield
    finally:
        _register(env=oc.env, decode=oc.decode)


def _register(**resolvers: Any) -> None:
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"oc.{name}", resolver, replace=True)


def _name(key: str, *default: Any) -> str:
    return f"{_NAMES}{','.join([key, *map(_argument, default)])}}}"


def _decode_later(expr: str | None, _parent_: Container, _node_: Node) -> Any:
    if isinstance(expr, str) and _NAMES in expr:
        return f"${{oc.decode:{expr}}}"
    return oc.decode(expr, _parent_, _node_)


def _argument(value: Any) -> str:
    """As it is written in an interpolation."""
    if not isinstance(value, str):
        return "null" if value is None else str(value)
    if _NAMES in value:
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
    return f"'{escaped}'"
