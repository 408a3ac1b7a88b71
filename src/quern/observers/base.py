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


def extremes(values: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest of the values with a weight above zero."""
    if counts is not None and bool((counts <= 0).any()):
        values = values[..., counts > 0]
    return torch.aminmax(values, dim=-1, keepdim=True)


OBSERVERS: Registry[type[Observer]] = Registry("observer", "quern.observers")
