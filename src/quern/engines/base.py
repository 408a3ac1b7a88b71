"""Engines: packed weights times activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

from quern.checkpoint.checkpoint import Checkpoint
from quern.core.artifact import METHOD, quantization_of
from quern.core.engine import BatchModel
from quern.core.errors import UserError, option
from quern.core.recipe import Recipe, parse_recipe
from quern.core.registry import Registry
from quern.core.suggest import did_you_mean

DtypeName = Literal["auto", "float32", "bfloat16"]


class Engine(ABC):
    """Something that runs models."""

    @abstractmethod
    def supports(self, recipe: Recipe | None) -> str | None:
        """None if the engine runs artifacts of ``recipe`` (None: an unquantized checkpoint), otherwise why not."""

    def runs(self, checkpoint: Checkpoint) -> str | None:
        """None if the engine runs what lies in ``checkpoint``, otherwise why not."""
        config = quantization_of(checkpoint.config)
        if config is None:
            return self.supports(None)
        if config.get("quant_method") != METHOD:
            return f"it does not run what {config.get('quant_method')} quantized"
        return self.supports(parse_recipe(config.get("recipe"), "of the artifact"))

    @abstractmethod
    def load(self, path: str | Path, *, dtype: DtypeName = "auto", threads: int | None = None) -> BatchModel:
        """Load a folder. ``dtype`` is that of the activations; ``auto``: as the folder's config says."""


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
