"""Work that waits until somebody imports a module, so that ``import alds_fast`` does not have to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _LoaderThenCalls(Loader):
    """The module's own loader; when it has run the module, the calls are made and it takes its place again."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module with its own loader in place, then make the calls, each once."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        for call in self._finder.waiting.pop(module.__spec__.name, ()):
            call()


class _Finder(MetaPathFinder):
    """Lets the other finders find a module that is waited for; the calls wait until it is run, not only looked for."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[], None]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders say of a module that is waited for, with the calls added; None for any other."""
        if name not in self.waiting:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenCalls(spec.loader, self)
        return spec


_finder = _Finder()


def when_imported(name: str, call: Callable[[], None]) -> None:
    """Call when that module has been imported: at once if it is, else right after its code has run.

    ``name`` may be that of a module inside a package, also of one that loads its modules when they are first used.
    """
    if name in sys.modules:
        call()
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.waiting.setdefault(name, []).append(call)
