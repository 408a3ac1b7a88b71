"""Registries: a thing is added by dropping one file into its folder.

A ``Registry`` knows the package whose modules register into it and imports them all on first use, so that adding a
codec, observer, rounding, transform, format, engine, architecture or measure touches no list. Names are persisted in
recipes, artifacts and results; they are strings, never class names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from quern.core.errors import UserError
from quern.core.text.language import gettext
from quern.core.text.suggest import did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A named collection of ``T``, filled by the modules of ``package`` (``base`` and names with ``_`` in front skipped)."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator that registers an entry under ``name``; a name given twice is a programming error."""

        def register(entry: T) -> T:
            if name in self._entries:
                raise AssertionError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return register

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if module.name != "base" and not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True

    def get(self, name: str) -> T:
        """The entry called ``name``. Raises ``UserError`` with the known names if there is none."""
        self._load()
        if name not in self._entries:
            known = self.names()
            raise UserError(
                gettext(
                    "unknown {kind} {name!r}; known: {known}{hint}",
                    kind=self.kind,
                    name=name,
                    known=", ".join(known),
                    hint=did_you_mean(name, known),
                )
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
