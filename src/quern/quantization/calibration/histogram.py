"""Ranges of static activation scales: a histogram of each linear's inputs, handed to the same observers as weights."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.observers.base import Observer

BINS = 4096
LEVELS = 255
"""Steps between the least and greatest code of a symmetric int8 grid."""


class InputHistogram:
    """Counts of |x| over all tokens, in bins that double their width whenever a larger value comes."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        self.greatest: list[float] = []
        """Of each batch that was added, in order."""

    def add(self, inputs: Tensor) -> None:
        """Count the values of ``inputs``, any shape."""
        sizes = inputs.float().abs().reshape(-1).cpu()
        top = float(sizes.max())
        self.greatest.append(top)
        if self.limit == 0.0:
            self.limit = top
        while top > self.limit > 0:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
            self.limit *= 2
        if self.limit > 0:
            self.counts += torch.histc(sizes, BINS, 0, self.limit).double()

    def scale(self, observer: Observer) -> float:
        """The scale of a symmetric int8 grid over the observed range; the smallest normal number if nothing came."""
        upper_edges = torch.arange(1, BINS + 1, dtype=torch.float32) * (self.limit / BINS)
        values = torch.cat([-upper_edges.flip(0), upper_edges])[None]
        counts = torch.cat([self.counts.flip(0), self.counts]).float()
        if not bool((counts > 0).any()) or self.limit == 0:
            return float(torch.finfo(torch.float32).tiny)
        end = observer.follow(torch.tensor(self.greatest, dtype=torch.float64))
        if end is None:
            low, high = observer.observe(values, _reconstruct, counts)
            end = torch.maximum(-low, high)
        return max(float(end) * 2 / LEVELS, float(torch.finfo(torch.float32).tiny))


def _reconstruct(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = torch.maximum(low.abs(), high.abs()) * (2 / LEVELS)
    return (values / scale).round_().clamp_(-128, 127).mul_(scale)
