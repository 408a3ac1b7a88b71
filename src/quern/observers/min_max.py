"""The whole range that occurs."""

from __future__ import annotations

from torch import Tensor

from quern.observers.base import OBSERVERS, Observer, Reconstruct, extremes


@OBSERVERS.add("min_max")
class MinMax(Observer):
    """Nothing is clipped: low and high are the least and the greatest value."""

    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return extremes(values, counts)
