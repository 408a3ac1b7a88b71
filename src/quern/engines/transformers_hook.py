"""Makes transformers load quern's artifacts after ``import quern``, without importing transformers for it.

transformers looks quantizers up in ``transformers.quantizers.auto``. The finder below waits for that module to be
imported, lets the ordinary loader do it, and then registers quern's quantizer.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    from quern.engines import _transformers_plugin

    _transformers_plugin.register()


def install() -> None:
    """Register the quantizer now if transformers' registry is loaded, otherwise as soon as it is."""
    if TARGET in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
