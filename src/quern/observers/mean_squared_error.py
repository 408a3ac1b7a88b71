"""The range that loses least."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.observers.base import OBSERVERS, Observer, Reconstruct, extremes

SHRINK = tuple(1.0 - 0.05 * step for step in range(12))
"""Candidate ranges, as fractions of the whole one: 1.00 down to 0.45."""

FEW = 1 << 14
"""Values of which all candidates are tried at once: of few the calls cost more than what they compute."""


@OBSERVERS.add("mean_squared_error")
class MeanSquaredError(Observer):
    """Tries shrunken ranges and keeps, row by row, the one with the least (weighted) squared reconstruction error."""

    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = extremes(values, counts)
        if values.numel() <= FEW:
            return _at_once(values, low, high, reconstruct, counts)
        best_low, best_high = low, high
        best = torch.full_like(low, torch.inf)
        for shrink in SHRINK:
            error = reconstruct(values, low * shrink, high * shrink).sub_(values).square_()
            if counts is not None:
                error *= counts
            total = error.sum(-1, keepdim=True)
            better = total < best
            best = torch.where(better, total, best)
            best_low = torch.where(better, low * shrink, best_low)
            best_high = torch.where(better, high * shrink, best_high)
        return best_low, best_high


def _at_once(
    values: Tensor, low: Tensor, high: Tensor, reconstruct: Reconstruct, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the loop over the candidates finds, to the last bit: the first of those that lose least."""
    shrink = torch.tensor(SHRINK, dtype=values.dtype, device=values.device).view(-1, *[1] * values.ndim)
    lows, highs = low * shrink, high * shrink
    error = reconstruct(values[None], lows, highs).sub_(values).square_()
    if counts is not None:
        error *= counts
    total = error.sum(-1, keepdim=True)
    which = torch.where(total.isnan(), torch.inf, total).argmin(0, keepdim=True)
    return lows.gather(0, which)[0], highs.gather(0, which)[0]
