"""Quern's own format: the codec's parts as they are, and every module's scheme spelled out in config.json.

Described byte for byte in docs/format.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quern.codecs.base import CODECS
from quern.core.artifact import INPUT_SCALE, INPUT_SIGNS, METHOD, VERSION
from quern.core.packed import QuantizedWeight
from quern.core.recipe import WeightScheme
from quern.formats.base import FORMATS, Format


@FORMATS.add("quern")
class QuernFormat(Format):
    """``<module>.<part>`` for every part, ``<module>.input_scale`` float32 ``()`` for static activations, and
    ``<module>.input_signs`` uint8 ``(ceil(columns / 8),)`` for rotated inputs."""

    def check(self, schemes: dict[str, WeightScheme], shapes: dict[str, tuple[int, ...]]) -> None:
        pass

    def encode(
        self, module: str, weight: QuantizedWeight, input_scale: float | None, input_signs: Tensor | None = None
    ) -> dict[str, Tensor]:
        tensors = {f"{module}.{name}": part for name, part in weight.parts.items()}
        if input_scale is not None:
            tensors[f"{module}.{INPUT_SCALE}"] = torch.tensor(input_scale, dtype=torch.float32)
        if input_signs is not None:
            tensors[f"{module}.{INPUT_SIGNS}"] = input_signs
        return tensors

    def parts(
        self, module: str, scheme: WeightScheme, shape: tuple[int, int], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        names = CODECS.get(scheme.codec)(scheme).part_shapes(shape)
        return {name: tensors[f"{module}.{name}"] for name in names}

    def quantization_config(
        self, schemes: dict[str, WeightScheme], unquantized: Sequence[str], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format_version": VERSION,
            "recipe": self.recipe.to_json(),
            "modules": {module: scheme.model_dump(mode="json") for module, scheme in sorted(schemes.items())},
        }
