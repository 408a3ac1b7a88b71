"""Feedback among rows: what rows already rounded got wrong, those behind them make up for.

To second order the errors E of a linear cost sum_t (g_t . E x_t)^2 / 2 with g_t the gradient of the loss at its outputs.
Taken apart as two Hessians, that of the inputs H and that of the outputs G = sum_t g_t g_t^T, this is tr(G E H E^T) (YAQA,
Tseng et al. 2025, arXiv 2505.22988, section 3). With G = U D U^T, U unit upper triangular, rows are to be rounded towards

    w'_i = w_i + sum_{j < i} U_ji (w_j - q_j)

as columns are by ``gptq`` (there row by row, here a row with all its columns). Rows of a set are rounded together, each with
feedback among its columns; for sets U is divided by what lies within them, so that what they are rounded towards counts all
rows of the set at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, pieces
from quern.quantization.rounding.factor import factorize

DAMPING = 0.1
"""Added to the diagonal of G, as a fraction of its mean. Gradients are few, and what they do not show is not free."""
SETS = 32
"""Sets of rows of a matrix, about: of m sets all but 1 / m of what feedback can gain is gained."""
COLUMNS = 1024
"""Columns that a worker multiplies at a time."""


class RowFeedback:
    """Of one linear."""

    def __init__(self, hessian: Tensor, workers: Workers) -> None:
        """``hessian``: G float32 ``(rows, rows)``, of which only the upper triangle is read; it is overwritten."""
        self._upper, self._workers = factorize(hessian, DAMPING, False, workers).upper, workers

    def sets(self, rows: int, multiple: int) -> list[tuple[int, int]]:
        """The sets as ``(start, stop)``; all but the last have a multiple of ``multiple`` rows."""
        return pieces(rows, -(-rows // (SETS * multiple)) * multiple)

    def due(self, error: Tensor, start: int, stop: int) -> Tensor:
        """What rows ``[start, stop)`` are to make up for, float32 ``(stop - start, columns)``; ``error`` ``(start, columns)``
        is what the rows before them got wrong, W - Q."""
        inside = self._upper[start:stop, start:stop]
        share = torch.linalg.solve_triangular(
            inside, self._upper[:start, start:stop], upper=True, left=False, unitriangular=True
        )
        found = torch.empty(stop - start, error.shape[1], device=error.device)

        def columns(part: tuple[int, int]) -> None:
            torch.mm(share.T, error[:, slice(*part)], out=found[:, slice(*part)])

        self._workers.map(columns, pieces(error.shape[1], COLUMNS))
        return found
