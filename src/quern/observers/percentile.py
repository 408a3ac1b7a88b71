"""The range that leaves the rarest values out."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.observers.base import OBSERVERS, Observer, Reconstruct

TAIL = 0.0005
"""Share of the weight clipped at either end; 99.9 % stay inside."""


@OBSERVERS.add("percentile")
class Percentile(Observer):
    """Clips the lowest and the highest 0.05 % of the (weighted) values; of fewer than 2000 equal weights none.

    Both ends are values that occur (the inverted distribution function, Hyndman and Fan 1996, definition 1): a value of
    weight n counts like n equal values, which interpolation between neighbours would not give.
    """

    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ordered, order = values.sort(dim=-1)
        weights = torch.ones_like(ordered) if counts is None else counts[order]
        reached = weights.double().cumsum(-1)
        total = reached[..., -1:]
        low = torch.searchsorted(reached, TAIL * total)
        high = torch.searchsorted(reached, (1 - TAIL) * total, right=True)
        most = ordered.shape[-1] - 1
        return ordered.gather(-1, low.clamp(max=most)), ordered.gather(-1, high.clamp(max=most))
