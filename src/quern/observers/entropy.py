"""The range that keeps most of the distribution's information."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.observers.base import OBSERVERS, Observer, Reconstruct, counted

BINS = 2048
"""Of the whole range."""
SHRINK = tuple(2.0 ** (-step / 8) for step in range(33))
"""Candidate ranges, as fractions of the whole one: 1 down to 1/16, which is 128 of the bins."""


@OBSERVERS.add("entropy")
class Entropy(Observer):
    """Keeps the range with the least KL divergence of the values' distribution from what the grid leaves of it.

    Migacz 2017 (8-bit inference with TensorRT), for any grid: P is the histogram of the values, those beyond the range added
    to the last bin inside; Q has the same bins without them, and shares the mass of every code evenly among the bins that
    hold anything. Made for many values, such as the histogram of a linear's inputs. Of few, which lie in bins of their own,
    nothing is lost by rounding, so that the whole range is kept.
    """

    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values, weights = counted(values, counts)
        low, high = torch.aminmax(values, dim=-1, keepdim=True)
        centres, mass = _histogram(values, weights, low, high)
        best_low, best_high = low, high
        best = torch.full(low.shape, torch.inf, dtype=torch.float64, device=low.device)
        for shrink in SHRINK:
            divergence = _divergence(centres, mass, low * shrink, high * shrink, reconstruct)
            better = divergence < best
            best = torch.where(better, divergence, best)
            best_low = torch.where(better, low * shrink, best_low)
            best_high = torch.where(better, high * shrink, best_high)
        return best_low, best_high


def _histogram(values: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Centres float32 and masses float64 of the bins that hold anything, ``(..., min(n, BINS))``, in order.

    Where a row has fewer, the last centre is repeated with no mass.
    """
    width = (high - low) / BINS
    ordered, order = values.sort(dim=-1)
    bins = torch.where(width > 0, (ordered - low) / width, 0.0).floor_().clamp_(max=BINS - 1)
    new = torch.zeros(bins.shape, dtype=torch.int64, device=values.device)
    new[..., 1:] = bins[..., 1:] != bins[..., :-1]
    slots = new.cumsum(-1)
    size = (*values.shape[:-1], min(values.shape[-1], BINS))
    mass = torch.zeros(size, dtype=torch.float64, device=values.device).scatter_add_(-1, slots, weights[order])
    middle = torch.minimum(torch.maximum(low + (bins + 0.5) * width, low), high)
    centres = middle[..., -1:].expand(size).clone().scatter_(-1, slots, middle)
    return centres, mass


def _divergence(centres: Tensor, mass: Tensor, low: Tensor, high: Tensor, reconstruct: Reconstruct) -> Tensor:
    """KL divergence float64 ``(..., 1)`` of P from Q for the range ``[low, high]``; infinite where nothing lies inside."""
    inside = (centres >= low) & (centres <= high) & (mass > 0)
    kept = torch.where(inside, mass, 0.0)
    total = mass.sum(-1, keepdim=True)
    below = torch.where(centres < low, mass, 0.0).sum(-1, keepdim=True)
    place = torch.arange(mass.shape[-1], device=mass.device).expand(mass.shape)
    first = torch.where(inside, place, mass.shape[-1] - 1).amin(-1, keepdim=True)
    last = torch.where(inside, place, 0).amax(-1, keepdim=True)
    clipped = kept.scatter_add(-1, first, below)
    clipped = clipped.scatter_add(-1, last, total - below - kept.sum(-1, keepdim=True))

    values = reconstruct(centres, low, high)
    codes = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    codes[..., 1:] = values[..., 1:] != values[..., :-1]
    codes = codes.cumsum(-1)
    shared = torch.zeros_like(mass).scatter_add_(-1, codes, kept).gather(-1, codes)
    sharers = torch.zeros_like(mass).scatter_add_(-1, codes, inside.double()).gather(-1, codes)
    p, q = clipped / total, shared / sharers / kept.sum(-1, keepdim=True)
    terms = torch.where(inside, p * (p / q).log(), 0.0).sum(-1, keepdim=True)
    return torch.where(inside.any(-1, keepdim=True), terms, torch.inf)
