"""Which tensors a checkpoint must hold, as its configuration says: names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quern.architectures.base import Architecture
from quern.codecs.base import CODECS
from quern.core.artifact import INPUT_SCALE, INPUT_SIGNS, in_block, module_schemes
from quern.core.errors import UserError
from quern.core.recipe import WeightScheme, parse_recipe

FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
"""Dtypes of weights that are not quantized."""


@dataclass(frozen=True)
class Expected:
    """One tensor."""

    shape: tuple[int, ...]
    dtypes: frozenset[torch.dtype] = FLOATS
    """Those that it may have."""


def unquantized(architecture: Architecture) -> dict[str, Expected]:
    """The tensors of an unquantized checkpoint."""
    return {name: Expected(tuple(shape)) for name, shape in architecture.expected_shapes().items()}


def artifact(architecture: Architecture, config: dict[str, Any]) -> dict[str, Expected]:
    """The tensors of an artifact in quern's format; ``config`` is its ``quantization_config``. Raises ``UserError``."""
    schemes = module_schemes(config)
    recipe = parse_recipe(config.get("recipe"), "of the artifact")
    expected = unquantized(architecture)
    linears = {*architecture.linears()}
    for module, scheme in schemes.items():
        found = expected.pop(f"{module}.weight", None)
        if found is None:
            raise UserError(f"the artifact names a module {module!r} that the model does not have")
        stem = module.partition(".layers.")[2].partition(".")[2]
        if stem not in linears and module not in (architecture.embedding, architecture.head):
            raise UserError(f"the artifact quantizes {module!r}, which is neither a linear nor an embedding")
        rows, columns = found.shape
        expected |= _parts(module, scheme, (rows, columns))
        if in_block(module) and recipe.activations.mode == "static":
            expected[f"{module}.{INPUT_SCALE}"] = Expected((), frozenset((torch.float32,)))
        if in_block(module) and recipe.rotated:
            expected[f"{module}.{INPUT_SIGNS}"] = Expected((-(-columns // 8),), frozenset((torch.uint8,)))
    return expected


def _parts(module: str, scheme: WeightScheme, shape: tuple[int, int]) -> Mapping[str, Expected]:
    sizes = CODECS.get(scheme.codec)(scheme).part_shapes(shape)
    return {f"{module}.{part}": Expected(tuple(size), frozenset((dtype,))) for part, (size, dtype) in sizes.items()}
