"""Classes of a user's own by config, and a refusal of settings that nothing would read.

Hydra merges what is typed into the file that a group has chosen. A class of one's own would get the
arguments of the class that it replaces, and could not be given others without a ``+``. So
``module._target_=my.LitModel module.width=64`` is read as ``module=own ++module...``, where the
file ``own`` is empty; below a group, what was there is taken away first.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

CONF = Path(__file__).parents[1] / "conf"

READ = (
    *("seed", "train", "test", "objective", "ckpt_path", "output_dir", "data", "module"),
    *("logger", "callbacks", "checkpoint", "trainer", "strategy"),
)
"""The keys of conf/train.yaml that train.py reads by itself; others have to be named by these."""

_REFERRED = frozenset({"model", "optimizer", "schedule", "tau"})
"""Keys of conf/train.yaml that are there to be named by others."""

_TARGET = "._target_"
_NAMED = re.compile(r"\$\{\s*\.*(\w+)\s*[.\[}]")
_LISTED = re.compile(r"^\+*callbacks=\[\s*\{")
"""Callbacks without names, which the group cannot take."""

_WITH_VALUE = frozenset(
    {
        *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"),
        *("--package", "-p", "--cfg", "-c", "--experimental-rerun"),
    }
)
"""Flags of Hydra that a value follows."""

_GIVEN_TO_TRAINER = {
    "strategy": "strategy=NAME, or strategy._target_=my.Strategy",
    "logger": "logger=NAME (none for no logger), or logger._target_=my.Logger",
}


def replace_whole(arguments: Sequence[str]) -> list[str]:
    """A command line by which each class that is typed replaces another with all its arguments."""
    typed = [_key(argument) for argument in arguments]
    replaced = {key.removesuffix(_TARGET) for key in typed if key.endswith(_TARGET)}
    replaced = {path for path in replaced if "." in path or _has_own(path)}
    arguments = [_LISTED.sub("+trainer.callbacks=[{", argument) for argument in arguments]
    found: list[str] = []
    emptied: set[str] = set()
    own = {key for key in typed if f"{key}=own" in arguments}
    for key, argument in zip(typed, arguments, strict=True):
        path = next((each for each in replaced | own if key.startswith(f"{each}.")), None)
        if path is None:
            found.append(argument)
            continue
        if path not in emptied | own:
            found.append(f"++{path}=null" if "." in path else f"{path}=own")
        emptied.add(path)
        found.append(f"++{argument.lstrip('+')}")
    return found


def flags_first(arguments: Sequence[str]) -> list[str]:
    """A command line that Hydra's parser reads, which takes overrides on one side of flags only."""
    if {"--info", "-i"} & set(arguments):  # whose value may be left out
        return list(arguments)
    flags, overrides = [], []
    for before, argument in pairwise(["", *arguments]):
        is_flag = argument.startswith("-") or before in _WITH_VALUE
        (flags if is_flag else overrides).append(argument)
    return flags + overrides


def find_own_code(arguments: Sequence[str]) -> None:
    """Let this process and its workers import from the folder of --config-dir and from this one.

    What a launcher starts elsewhere, such as a job of Slurm, imports the scripts themselves, too.
    """
    folders = [*config_folders(arguments), Path.cwd()]
    paths = [str(folder.absolute()) for folder in folders]
    sys.path[1:1] = paths  # behind the scripts themselves
    given = os.environ.get("PYTHONPATH")
    scripts = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([scripts, *paths, *([given] if given else [])])


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """The values of --config-dir, as Hydra's parser takes them."""
    found = []
    for argument, following in pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(Path(value or following))
    return found


def several(cfg: Any) -> list[Any]:
    """What a group of several makes: of a class, of classes by name, of a list of them, or none."""
    if not cfg:
        return []
    if isinstance(cfg, ListConfig):
        return [instantiate(each) for each in cfg]
    return [instantiate(each) for each in ([cfg] if "_target_" in cfg else cfg.values())]


def read_by(cfg: DictConfig, start: Iterable[str]) -> DictConfig:
    """What some keys read of a configuration, besides themselves: all that need be resolved."""
    found = _reached(cfg, start)
    return OmegaConf.masked_copy(cfg, [name for name in cfg if name in found])


def needed(cfg: DictConfig, typed: Iterable[str], *, also: Iterable[str] = ()) -> DictConfig:
    """What a job reads of its configuration, which is what can be resolved.

    Args:
        cfg: as Hydra composed it.
        typed: what the command line sets.
        also: keys that the script reads besides those of train.py.

    Raises:
        ValueError: something was set that has no effect; says what to write instead.
    """
    for key, instead in _GIVEN_TO_TRAINER.items():
        if key in cfg.trainer:
            raise ValueError(f"trainer.{key} is not allowed: it has a group. Write {instead}.")
    reached = _reached(cfg, [*READ, *also])
    groups = {re.split(r"[.@]", _key(each))[0] for each in typed if not each.startswith("~")}
    for name in cfg:
        may_be_unread = name in _REFERRED and (name == "tau" or name not in groups)
        if name not in reached and not may_be_unread:
            raise ValueError(_no_effect(str(name), cfg))
    return OmegaConf.masked_copy(cfg, [name for name in cfg if name in reached])


def _no_effect(name: str, cfg: DictConfig) -> str:
    module = cfg.module.get("_target_") if isinstance(cfg.get("module"), Mapping) else None
    if name in _REFERRED:
        return (
            f"{name} was set, but nothing reads it: {module} is not given it. Leave it out, or hand"
            f" it over: '+module.{name}=${{{name}}}'."
        )
    return (
        f"{name} was set, but nothing reads it. Allowed are {', '.join(sorted(READ))} and what"
        f" these name, as ${{{name}}}. Correct the name, or leave it out."
    )


def _reached(cfg: DictConfig, start: Iterable[str]) -> set[str]:
    """The keys at the top that some keys read, or what these name, and so on."""
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    left, reached = list(start), set[str]()
    while left:
        name = left.pop()
        if name not in reached and name in cfg:
            reached.add(name)
            left += _NAMED.findall(str(values[name]))
    return reached


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0]


def _has_own(group: str) -> bool:
    return (CONF / group / "own.yaml").exists()
