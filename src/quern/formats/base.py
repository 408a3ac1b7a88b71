"""Formats: how quantized weights lie on disk so that some loader finds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from quern.core.packed import QuantizedWeight
from quern.core.recipe import Recipe, WeightScheme
from quern.core.registry import Registry


class Format(ABC):
    """Pure functions from quantized weights to named tensors and a ``quantization_config`` for config.json."""

    extra: str | None = None
    """The optional dependency that loading this format needs, if any."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def check(self, schemes: dict[str, WeightScheme], shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ``UserError`` with the reason if the format cannot store this.

        ``schemes`` maps every quantized module's name to its scheme, ``shapes`` to its weight's (rows, columns).
        """

    @abstractmethod
    def encode(
        self, module: str, weight: QuantizedWeight, input_scale: float | None, input_signs: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The tensors, by full name, that store ``module``'s weight, the scale of its static activations, and the packed
        signs of the rotation that its inputs want."""

    @abstractmethod
    def parts(
        self, module: str, scheme: WeightScheme, shape: tuple[int, int], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The codec's parts of ``module`` again, from the tensors that ``encode`` made."""

    @abstractmethod
    def quantization_config(
        self, schemes: dict[str, WeightScheme], unquantized: Sequence[str], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """What goes into config.json. ``unquantized``: the linears, by full name, that keep the checkpoint's weights;
        ``shapes`` as in ``check``."""

    def notes(self, biased: Sequence[str]) -> list[str]:
        """What whoever quantizes should know of the artifact's readers. ``biased``: the quantized modules with a bias."""
        return []


FORMATS: Registry[type[Format]] = Registry("format", "quern.formats")
