"""Runs a function on a module of another library right after its import, or at once if it is loaded.

Imports nothing that a program of the environment has not loaded anyway: `autoload` calls this for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

Visit = Callable[[ModuleType], None]


def after_import(name: str, visit: Visit) -> None:
    """Has `visit(module)` called once the module of this name is loaded; a second request for a name is ignored."""
    if name in sys.modules:
        visit(sys.modules[name])
    elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, visit))


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, with a loader that calls `visit` at the end."""

    def __init__(self, name: str, visit: Visit) -> None:
        self.name, self.visit = name, visit

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # the others find it; and it is loaded once
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.visit)
        return spec


class _Loader(Loader):
    """A module's own loader, which is put back, and then `visit`."""

    def __init__(self, own: Loader, visit: Visit) -> None:
        self._own, self._visit = own, visit

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        self._visit(module)
