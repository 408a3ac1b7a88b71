"""What there is to choose from: shipped recipes and every registry's names."""

from __future__ import annotations

from typing import Any

from quern.architectures.base import ARCHITECTURES
from quern.codecs.base import CODECS
from quern.core.recipe import load_recipe, profile_names
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
    ENGINES,
    ARCHITECTURES,
)


def catalogue() -> dict[str, Any]:
    """``{"recipes": {name: description}, "choices": {kind: [names]}}``, names sorted."""
    return {
        "recipes": {name: load_recipe(name).description for name in profile_names()},
        "choices": {registry.kind: registry.names() for registry in REGISTRIES},
    }
