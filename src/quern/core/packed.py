"""The value that travels from rounding to disk to an engine: a quantized weight matrix as named parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quern.core.recipe import WeightScheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix of shape ``(rows, columns)`` = (output, input) features, stored under ``scheme``.

    ``parts`` are what the scheme's codec wrote and alone can read; for ``integer``: ``codes`` (int32, bit-packed),
    ``scale`` and, where asymmetric, ``zero_point``.
    """

    scheme: WeightScheme
    shape: tuple[int, int]
    parts: dict[str, torch.Tensor]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())
