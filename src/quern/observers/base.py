"""Observers: which range a scale covers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from quern.core.registry import Registry

Reconstruct = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(values (..., n), low (..., 1), high (..., 1)) -> values (..., n)`` as they come back from the grid of that range."""


class Observer(ABC):
    """Picks ``[low, high]`` for each row of values that share a scale."""

    @abstractmethod
    def observe(self, values: Tensor, reconstruct: Reconstruct, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ranges ``(low, high)``, each ``(..., 1)``, of float32 ``values`` ``(..., n)``.

        ``counts`` ``(n,)`` weighs the values: how often each occurs (a histogram) or how much each matters. Values with
        weight zero are ignored.
        """

    def follow(self, greatest: Tensor) -> Tensor | None:
        """The end, float64 ``()``, of a symmetric range of values that came batch after batch, from the ``greatest`` |x|
        of each in order, ``(batches,)``.

        None, as here: the observer looks at all values at once and is asked to ``observe`` them.
        """
        return None


def extremes(values: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest of the values with a weight above zero."""
    if counts is not None and bool((counts <= 0).any()):
        values = values[..., counts > 0]
    return torch.aminmax(values, dim=-1, keepdim=True)


def counted(values: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values ``(..., m)`` that have a weight above zero, and their weights float64 ``(m,)``: 1 without ``counts``."""
    if counts is None:
        return values, torch.ones(values.shape[-1], dtype=torch.float64, device=values.device)
    kept = counts > 0
    return values[..., kept], counts[kept].double()


OBSERVERS: Registry[type[Observer]] = Registry("observer", "quern.observers")
