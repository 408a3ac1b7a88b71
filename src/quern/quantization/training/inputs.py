"""What a linear makes of its inputs at run time, for training: int8 numbers, through which gradients go straight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quern.codecs.trainable.base import straight_through
from quern.core.packed import ActivationMode
from quern.rotation.rotation import rotate, rotate_back

LARGEST, LEAST = 127, -128


@dataclass(frozen=True)
class InputRounding:
    """Inputs ``(..., columns)`` as the int8 numbers that an engine multiplies stand for."""

    mode: ActivationMode
    """Not ``none``."""
    scale: float | None
    """Of static activations."""
    group: int | None
    """Inputs of a token that share a scale; None: all."""
    signs: Tensor | None
    """Of the rotation before; what is returned is rotated back."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Rounded, with the gradient of the inputs themselves."""
        with torch.no_grad():
            turned = inputs.float() if self.signs is None else rotate(inputs, self.signs)
            width = self.group or turned.shape[-1]
            rounded = torch.cat([self._rounded(part) for part in torch.split(turned, width, dim=-1)], dim=-1)
            back = rounded if self.signs is None else rotate_back(rounded, self.signs)
        return straight_through(inputs, back.to(inputs.dtype))

    def _rounded(self, part: Tensor) -> Tensor:
        if self.scale is not None:
            scale = torch.tensor(self.scale)
        else:
            largest = part.abs().amax(-1, keepdim=True)
            scale = (largest / ((LARGEST - LEAST) / 2)).clamp(min=torch.finfo(torch.float32).tiny)
        return (part / scale).round().clamp(LEAST, LARGEST) * scale
