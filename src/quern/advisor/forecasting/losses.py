"""What recipes lost on a small model, for ordering them where nothing was measured yet: ``losses.json``."""

from __future__ import annotations

import functools
import json
import math
from importlib import resources

from pydantic import BaseModel, ConfigDict

from quern.advisor.scoring import SCALING_EXPONENT

FILE = "losses.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Lost(_Strict):
    """Of one recipe."""

    kl: float
    """Nats a token."""
    source: str


class Losses(_Strict):
    """The whole file."""

    model: str
    entropy: float
    """Of the unquantized model, nats a token."""
    recipes: dict[str, Lost]

    def kl(self, recipe: str) -> float | None:
        """Of a recipe by its name; None where it was not measured."""
        return self.recipes[recipe].kl if recipe in self.recipes else None

    def cost(self, recipe: str) -> float | None:
        """Halvings of an unquantized model that would lose as much (``quern.advisor.scoring``)."""
        loss = self.kl(recipe)
        return None if loss is None else math.log2(1 + loss / self.entropy) / SCALING_EXPONENT


@functools.cache
def losses() -> Losses:
    """The file."""
    return Losses.model_validate(json.loads((resources.files("quern.advisor.forecasting") / FILE).read_text("utf-8")))
