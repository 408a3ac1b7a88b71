"""The range that follows the data: batch after batch, the latest counting most."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.observers.base import OBSERVERS, Observer, Reconstruct, extremes

DECAY = 0.9
"""What one batch counts for in relation to the next one; about the last ten decide."""


@OBSERVERS.add("moving_average")
class MovingAverage(Observer):
    """Exponential moving average of each batch's extremes (Jacob et al. 2018, arXiv 1712.05877, section 3.1).

    Divided by the sum of the batches' weights, so that the first one counts no more than its place gives it (Kingma and Ba
    2015, arXiv 1412.6980, section 3). A weight matrix, or a histogram, is one batch, whose extremes are ``min_max``.
    """

    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return extremes(values, counts)

    def follow(self, greatest: Tensor) -> Tensor:
        age = torch.arange(len(greatest) - 1, -1, -1, dtype=torch.float64)
        weights = DECAY**age
        return (weights * greatest.double()).sum() / weights.sum()
