"""Names that are imported when they are first used (PEP 562), so that `import mm` costs next to nothing, and modules
that moved since version 0.1, which can still be imported by their old names."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MOVED = {
    "mm.arrange": "mm.lowbit.formats", "mm.block": "mm.nn.block", "mm.delayed": "mm.speech.delayed",
    "mm.engine": "mm.decode.engine", "mm.latent": "mm.nn.latent", "mm.moe": "mm.nn.moe",
    "mm.rope": "mm.positions.rope", "mm.sampling": "mm.decode.sampling", "mm.speculate": "mm.decode.speculate",
    "mm.state": "mm.nn.state", "mm.tables": "mm.checkpoint.tables", "mm.transformer": "mm.nn.transformer",
    "mm.visibility": "mm.positions.visibility", "mm.encoders.flex": "mm.encoders.vision.flex"}


def lazy(package: str, names: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """(`__getattr__`, `__dir__`, `__all__`) for a package whose public names live in the given modules."""
    def getter(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(names[name]), name)
        setattr(sys.modules[package], name, value)
        return value
    return getter, lambda: sorted({*vars(sys.modules[package]), *names}), sorted(names)


def imported(place: str) -> Any:
    """The object at `module:name`, whose module is imported now."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module that moved: the old name stands for the very module that has the new one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def keep_old_names() -> None:
    """Once in a process."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
