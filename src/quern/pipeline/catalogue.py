"""What there is to choose from: shipped recipes and every registry's names."""

from __future__ import annotations

from typing import Any

from quern.architectures.base import ARCHITECTURES
from quern.codecs.base import CODECS
from quern.core.recipe import MIXES, Recipe, load_recipe, profile_names
from quern.core.registry import Registry
from quern.engines.base import ENGINES
from quern.formats.base import FORMATS
from quern.observers.base import OBSERVERS
from quern.quantization.rounding.base import ROUNDINGS
from quern.quantization.transforms.base import TRANSFORMS

REGISTRIES: tuple[Registry[Any], ...] = (
    CODECS,
    OBSERVERS,
    ROUNDINGS,
    TRANSFORMS,
    FORMATS,
    MIXES,
    ENGINES,
    ARCHITECTURES,
)


def technique_of(recipe: Recipe) -> str:
    """What the literature calls a recipe: ``hybrid`` where linears have several schemes, otherwise after its codec."""
    schemes = {str(recipe.weights), *(str(o.scheme) for o in recipe.overrides if o.scheme is not None)}
    if len(schemes) > 1 or recipe.mix is not None:
        return "hybrid"
    if recipe.activations.mode != "none":
        return f"{recipe.activations.mode} integer products"
    return CODECS.get(recipe.weights.codec).technique if recipe.weights.quantized else "none"


def catalogue() -> dict[str, Any]:
    """``{"recipes": {name: description}, "techniques": {technique: [names]}, "choices": {kind: [names]}}``, all sorted."""
    recipes = {name: load_recipe(name) for name in profile_names()}
    techniques: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        techniques.setdefault(technique_of(recipe), []).append(name)
    return {
        "recipes": {name: recipe.description for name, recipe in recipes.items()},
        "techniques": dict(sorted(techniques.items())),
        "choices": {registry.kind: registry.names() for registry in REGISTRIES},
    }
