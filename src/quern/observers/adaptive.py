"""The best of all other observers, row by row, by what quantizing would cost."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.observers.base import OBSERVERS, Observer, Reconstruct, counted

NAME = "adaptive"


@OBSERVERS.add(NAME)
class Adaptive(Observer):
    """Asks every other observer and keeps, for each scale, the range with the least squared error.

    Squares count by ``counts``; where a rounding fits scales to the Hessian, these are its diagonal, and the sum is the
    linear's output error but for the products of different inputs. Of ranges that cost the same, the observer that comes
    first by name gives it.
    """

    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ranges = [
            OBSERVERS.get(name)().observe(values, reconstruct, counts) for name in OBSERVERS.names() if name != NAME
        ]
        values, weights = counted(values, counts)
        best_low, best_high = ranges[0]
        best = torch.full(best_low.shape, torch.inf, dtype=torch.float64, device=values.device)
        for low, high in ranges:
            error = reconstruct(values, low, high).sub_(values).square_().double().mul_(weights).sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
        return best_low, best_high
