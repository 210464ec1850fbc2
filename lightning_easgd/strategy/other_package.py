"""Tells users of pytorch_lightning, another package than lightning.pytorch, what to import.

[Note: two packages] ``pytorch_lightning`` and ``lightning.pytorch`` are the same code twice, and
neither takes the classes or the names of the other: its Trainer answers that a strategy is invalid.
So the registry of pytorch_lightning gets our names too, and a strategy that only says what to do.
It is often imported after us (its name sorts behind ours), and importing it ourselves would take
seconds. So its import is awaited.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

_OTHER = "pytorch_lightning"
_REGISTRY = "pytorch_lightning.strategies"
_WAY_OUT = (
    "Write `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`, and so in"
    " all other imports: they are two packages, which do not take each other's classes"
)


def hint() -> str:
    """Which import to change, if this process has imported the other package; else nothing."""
    return f". {_WAY_OUT}" if _OTHER in sys.modules else ""


def explain_names(names: Iterable[str]) -> None:
    """Let the other package's Trainer say which import to change when it is given these names."""
    names = list(names)
    if (module := sys.modules.get(_REGISTRY)) is not None:
        _register(module, names)
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting(names))


def _register(module: ModuleType, names: Iterable[str]) -> None:
    registry: Any = getattr(module, "StrategyRegistry", None)
    for name in names if registry is not None else ():
        if name not in registry:
            registry.register(name, _refuse, description="For lightning.pytorch", strategy_=name)


def _refuse(strategy_: str) -> NoReturn:
    raise MisconfigurationException(
        f"Trainer(strategy={strategy_!r}) of pytorch_lightning cannot use lightning_easgd, which is"
        f" for the Trainer of lightning.pytorch. {_WAY_OUT}."
    )


class _Awaiting(MetaPathFinder):
    """Registers the names as soon as the other package's registry has been imported."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    @override
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != _REGISTRY or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module, self._names)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
