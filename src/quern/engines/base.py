"""Engines: packed weights times activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.core.artifact import quantization_of
from quern.core.engine import BatchModel
from quern.core.errors import UserError, option
from quern.core.recipe import Recipe
from quern.core.registry import Registry
from quern.core.text.suggest import did_you_mean
from quern.formats.base import FORMATS, StoredModule, format_of, reader_of
from quern.loading.fitting import model_config

DtypeName = Literal["auto", "float32", "bfloat16"]


class Engine(ABC):
    """Something that runs models."""

    @abstractmethod
    def obstacle(self, format: str | None, modules: Collection[StoredModule]) -> str | None:
        """Why the engine does not run artifacts of the format whose method is ``format`` (None: unquantized) with modules
        that are stored like ``modules``; None if it does."""

    def supports(self, recipe: Recipe | None) -> str | None:
        """None if the engine runs artifacts of ``recipe`` (None: an unquantized checkpoint), otherwise why not."""
        if recipe is not None and not FORMATS.get(recipe.format).opened:
            return f"quern writes the format {recipe.format} and does not open it"
        if recipe is None or FORMATS.get(recipe.format).opened_as_values:
            return self.obstacle(None, ())
        return self.obstacle(FORMATS.get(recipe.format).method, stored_modules(recipe))

    def runs(self, checkpoint: Checkpoint) -> str | None:
        """None if the engine runs what lies in ``checkpoint``, otherwise why not."""
        quantization = quantization_of(checkpoint.config)
        if quantization is None:
            return self.obstacle(None, ())
        method = quantization.get("quant_method")
        if format_of(method) is None:
            return f"it does not run what {method} quantized"
        reader = reader_of(quantization, architecture_of(model_config(checkpoint)))
        return self.obstacle(str(method), () if reader is None else reader.plan().values())

    @abstractmethod
    def load(self, path: str | Path, *, dtype: DtypeName = "auto", threads: int | None = None) -> BatchModel:
        """Load a folder. ``dtype`` is that of the activations; ``auto``: as the folder's config says."""


def stored_modules(recipe: Recipe) -> list[StoredModule]:
    """What ``recipe`` would store, one of every kind."""
    overriding = [(o.scheme or recipe.weights, o.activations or recipe.activations) for o in recipe.overrides]
    chosen = [(recipe.weights, recipe.activations), *overriding]
    inside = [StoredModule(scheme, recipe.rotated, a.mode, a.group_size) for scheme, a in chosen]
    found = [*inside, StoredModule(recipe.embedding), StoredModule(recipe.head)]
    return [module for module in found if module.scheme.quantized]


ENGINES: Registry[type[Engine]] = Registry("engine", "quern.engines")

AUTO = "auto"
PREFERRED = ("cpu",)
"""Engines in the order in which ``auto`` asks them; the reference engine comes last."""


def engine_for(checkpoint: Checkpoint, name: str = AUTO) -> str:
    """The engine called ``name``, or for ``auto`` the fastest one that runs ``checkpoint``. Raises ``UserError``."""
    if name != AUTO:
        if name not in ENGINES.names():
            known = [AUTO, *ENGINES.names()]
            raise UserError(f"unknown engine {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")
        if (reason := ENGINES.get(name)().runs(checkpoint)) is not None:
            raise UserError(
                f"the {name} engine does not run {checkpoint.path}: {reason}. "
                f"Use {option(f'engine={AUTO!r}', f'--engine {AUTO}')}, which takes the reference engine where it must: "
                "slower, but it runs what transformers runs"
            )
        return name
    return next((known for known in PREFERRED if ENGINES.get(known)().runs(checkpoint) is None), "reference")
