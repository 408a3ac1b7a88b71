"""The Hessian of a linear's squared output error: H = sum over tokens of weight x input input^T."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, pieces

TILE = 1024


def add_to_hessian(hessian: Tensor, inputs: Tensor, weights: Tensor | None, workers: Workers) -> None:
    """Add the tokens ``inputs`` ``(tokens, columns)``, weighted by ``weights`` ``(tokens,)``, to ``hessian``.

    ``hessian`` is float32 ``(columns, columns)``; only its upper triangle is kept. Products and sums are float32 whatever
    the dtype of the inputs, and their order depends on the sizes only.
    """
    rows = inputs.float()
    if weights is not None:
        rows = rows * weights.to(rows.device).clamp(min=0).sqrt()[:, None]

    def tile(columns: tuple[int, int]) -> None:
        start, stop = columns
        hessian[:stop, start:stop].addmm_(rows[:, :stop].T, rows[:, start:stop])

    workers.map(tile, list(reversed(pieces(hessian.shape[0], TILE))))


def norm_weights(inputs: Tensor) -> Tensor:
    """Weights that scale every token ``(tokens, columns)`` to unit norm: 1 / |x_t|^2, zero for a zero token."""
    squares = inputs.float().square().sum(1)
    return torch.where(squares > 0, squares.reciprocal(), 0)
