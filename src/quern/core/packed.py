"""The value that travels from rounding to disk to an engine: a quantized weight matrix as named parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quern.core.scheme import CodecScheme

if TYPE_CHECKING:
    import torch

ActivationMode = Literal["none", "dynamic", "static"]
"""What inputs become when a model runs: as they are, int8 with a scale a token, int8 with a calibrated scale."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix of shape ``(rows, columns)`` = (output, input) features, stored under ``scheme``.

    ``parts`` are what the scheme's codec wrote and alone can read; for ``integer``: ``codes`` (int32, bit-packed),
    ``scale`` and, where asymmetric, ``zero_point``.
    """

    scheme: CodecScheme
    shape: tuple[int, int]
    parts: dict[str, torch.Tensor]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


@dataclass(frozen=True)
class PackedLinear:
    """What a format stores of one module."""

    weight: QuantizedWeight
    activations: ActivationMode = "none"
    input_scale: float | None = None
    """Of static activations."""
    input_signs: torch.Tensor | None = None
    """Packed signs uint8 ``(ceil(columns / 8),)`` of the rotation of its inputs; None: they are not rotated."""
