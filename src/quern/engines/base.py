"""Engines: packed weights times activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

from quern.core.engine import LoadedModel
from quern.core.recipe import Recipe
from quern.core.registry import Registry

DtypeName = Literal["auto", "float32", "bfloat16"]


class Engine(ABC):
    """Something that runs models."""

    @abstractmethod
    def supports(self, recipe: Recipe | None) -> str | None:
        """None if the engine runs artifacts of ``recipe`` (None: an unquantized checkpoint), otherwise why not."""

    @abstractmethod
    def load(self, path: str | Path, *, dtype: DtypeName = "auto", threads: int | None = None) -> LoadedModel:
        """Load a folder. ``dtype`` is that of the activations; ``auto``: as the folder's config says."""


ENGINES: Registry[type[Engine]] = Registry("engine", "quern.engines")
