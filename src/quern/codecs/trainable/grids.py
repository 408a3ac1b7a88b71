"""Latent weights on a grid whose steps are learned (Esser et al. 2020, Learned Step Size Quantization, arXiv 1902.08153).

With v the latent weight, s the scale, q the level next to v / s and [-Q, P] the span of the levels, the value is q s and its
derivatives are (section 2.1, equations 3 and 5)

    by v: 1 where -Q <= v / s <= P, else 0;        by s: q - v / s there, else q.

The paper has integers; nothing in it asks for equal steps. Its factor for gradients of s (section 2.2) is left out: Adam
divides by their size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quern.codecs.trainable.base import Trainable, straight_through

if TYPE_CHECKING:
    from quern.codecs.base import Parts
    from quern.codecs.grouped import GroupedCodec

HALVINGS = 6
"""How often a latent weight is moved half-way to its stored value until it rounds to that."""


class _LearnedStep(torch.autograd.Function):
    """Values with the gradients of LSQ."""

    @staticmethod
    def forward(context: Any, latent: Tensor, scale: Tensor, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``scale``, ``low`` and ``high`` are broadcastable to ``latent`` ``(rows, columns)``."""
        context.save_for_backward(latent, scale, values, low, high)
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        latent, scale, values, low, high = context.saved_tensors
        places = latent / scale
        inside = ((places >= low) & (places <= high)).to(places.dtype)
        by_scale = gradients[0] * (values / scale - places * inside)
        return gradients[0] * inside, by_scale.sum_to_size(scale.shape), None, None, None


def learned_step(latent: Tensor, scale: Tensor, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``values`` (``latent`` rounded), differentiable by ``latent`` and ``scale``; levels span ``[low, high]``."""
    found: Tensor = _LearnedStep.apply(latent, scale, values, low, high)  # type: ignore[no-untyped-call]
    return found


class GridTrainable(Trainable):
    """Latent weights and the logarithms of factors of all scales. Zero points stay."""

    def __init__(self, codec: GroupedCodec, shape: tuple[int, int], parts: Parts, weight: Tensor) -> None:
        """``weight`` float32 ``(rows, columns)``: where latent weights begin, if that rounds to what is stored."""
        super().__init__()
        self.codec, self.shape = codec, shape
        stored = codec.restored(shape, parts)
        self.grid = stored.grid
        self._scale, self._zero = stored.scale, stored.zero
        low, high = self.grid.span(self._zero)
        self._unit = self._scale.abs() * (high - low) / ((1 << codec.params.bits) - 1)
        self._unit = torch.where(self._unit > 0, self._unit, 1.0)
        self.factor = nn.Parameter(torch.zeros_like(self._scale))
        self.latent = nn.Parameter(self._begin(weight, stored.codes.float()))

    def _wide(self, values: Tensor) -> Tensor:
        """Of each scale ``(scale rows, groups)`` for all weights, or broadcastable to them."""
        rows, columns = self.shape
        return self.codec.spread(self.codec.scales_of(values, rows), columns)

    def _begin(self, weight: Tensor, codes: Tensor) -> Tensor:
        """``weight``, or as far from the stored value towards it as rounds to that, within the span, in steps."""
        scale, zero = self._wide(self._scale), self._wide(self._zero)
        decoded = self.grid.decode(codes.clone(), scale, zero)
        low, high = (self._wide(end) for end in self.grid.span(self._zero))
        unit = self._wide(self._unit)
        wanted = torch.minimum(torch.maximum(weight / scale, low), high) * scale / unit
        for _ in range(HALVINGS):
            away = self.grid.decode(self.grid.encode(wanted * unit, scale, zero), scale, zero) != decoded
            wanted = torch.where(away, (wanted + decoded / unit) / 2, wanted)
        away = self.grid.decode(self.grid.encode(wanted * unit, scale, zero), scale, zero) != decoded
        return torch.where(away, decoded / unit, wanted)

    def _now(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latent weights, scales ``(scale rows, groups)``, these for all weights, and codes."""
        scaled = self._scale * self.factor.exp()
        scale = straight_through(scaled, self.grid.nearest_scale(scaled.detach()))
        wide, latent = self._wide(scale), self.latent * self._wide(self._unit)
        codes = self.grid.encode(latent.detach(), wide.detach(), self._wide(self._zero))
        return latent, scale, wide, codes

    def values(self) -> Tensor:
        latent, _, wide, codes = self._now()
        values = self.grid.decode(codes, wide.detach(), self._wide(self._zero))
        return learned_step(latent, wide, values, *(self._wide(end) for end in self.grid.span(self._zero)))

    @torch.no_grad()
    def parts(self) -> Parts:
        _, scale, _, codes = self._now()
        return self.codec.store(codes.to(torch.uint8), scale, self._zero, self.grid)
