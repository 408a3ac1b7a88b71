"""The range that leaves the rarest values out."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.observers.base import OBSERVERS, Observer, Reconstruct

TAIL = 0.0005
"""Share of the values clipped at either end; 99.9 % stay inside."""


@OBSERVERS.add("percentile")
class Percentile(Observer):
    """Clips the lowest and highest 0.05 % of the (weighted) values, interpolating between neighbours."""

    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ordered, order = values.sort(dim=-1)
        weights = torch.ones_like(ordered) if counts is None else counts[order].to(values)
        # Position of a value = weight below it plus half its own, as a share of the total.
        position = (weights.cumsum(-1) - weights / 2) / weights.sum(-1, keepdim=True)
        return _interpolate(ordered, position, TAIL), _interpolate(ordered, position, 1 - TAIL)


def _interpolate(ordered: Tensor, position: Tensor, share: float) -> Tensor:
    """The value at ``share`` of the weight; the outermost values stand for all that lies beyond them."""
    share_ = torch.full_like(position[..., :1], share)
    above = torch.searchsorted(position.contiguous(), share_).clamp(max=ordered.shape[-1] - 1)
    below = (above - 1).clamp(min=0)
    left, right = position.gather(-1, below), position.gather(-1, above)
    mix = ((share_ - left) / (right - left).clamp(min=1e-12)).clamp(0, 1)
    return torch.lerp(ordered.gather(-1, below), ordered.gather(-1, above), mix)
