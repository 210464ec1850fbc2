"""Tells users of pytorch_lightning, another package than lightning.pytorch, what to import.

[Note: two packages] ``pytorch_lightning`` and ``lightning.pytorch`` are the same code twice, and
neither takes the classes or the names of the other: its Trainer answers that a strategy is invalid.
So the registry of pytorch_lightning gets our names too, with a strategy that only says what to do.
The same is said when its Trainer looks for one of our objects among the names. pytorch_lightning is
often imported after us (its name sorts behind ours), and importing it ourselves would take seconds.
So its import is awaited.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

_REGISTRY = "pytorch_lightning.strategies"


def explain_import(names: Iterable[str], cls: type) -> None:
    """Let the other package's Trainer say which import to change.

    Args:
        names: of the strategies.
        cls: their class, for users who give the Trainer an object instead of a name.
    """
    ours = _Ours(list(names), cls)
    if (module := sys.modules.get(_REGISTRY)) is not None:
        ours.register(module)
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting(ours))


@dataclass(frozen=True)
class _Ours:
    """What the other package's Trainer cannot use."""

    names: list[str]
    cls: type

    def register(self, module: ModuleType) -> None:
        registry: Any = getattr(module, "StrategyRegistry", None)
        if registry is None or self.names[0] in registry:
            return
        for name in self.names:
            registry.register(
                name, _refuse, description="For lightning.pytorch", strategy_=repr(name)
            )
        available = registry.available_strategies
        registry.available_strategies = lambda: _Known(available(), self.cls)


class _Known(list[str]):
    """The names that the other package's Trainer knows; it looks for what it was given in them."""

    def __init__(self, names: Iterable[str], cls: type) -> None:
        super().__init__(names)
        self._cls = cls

    @override
    def __contains__(self, strategy: object) -> bool:
        if isinstance(strategy, self._cls):
            _refuse(f"{type(strategy).__name__}(...)")
        return super().__contains__(strategy)


def _refuse(strategy_: str) -> NoReturn:
    raise MisconfigurationException(
        f"Trainer(strategy={strategy_}) of pytorch_lightning cannot use lightning_easgd, which is"
        " for the Trainer of lightning.pytorch. Write `import lightning.pytorch as pl` instead of"
        " `import pytorch_lightning as pl`, and so in all other imports: they are two packages,"
        " which do not take each other's classes."
    )


class _Awaiting(MetaPathFinder):
    """Registers them as soon as the other package's registry has been imported."""

    def __init__(self, ours: _Ours) -> None:
        self._ours = ours

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
                self._ours.register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
