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

from dataclasses import dataclass

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, pieces
from quern.quantization.rounding.factor import factorize

SETS = 16
"""Sets of rows of a matrix, about: of m sets all but 1 / m of what feedback can gain is gained."""
COLUMNS = 1024
"""Columns that a worker multiplies at a time."""


@dataclass(frozen=True)
class OutputHessian:
    """G, and how much of the mean of its diagonal is added to that."""

    hessian: Tensor
    """Float32 ``(rows, rows)``, upper triangle."""
    damping: float

    def factor(self, order: Tensor, workers: Workers, used_up: bool = False) -> Tensor:
        """U float32 of the rows ``order``, in this order; of others it knows nothing. G may be ``used_up`` by it, which
        spares the copy of large ones."""
        own = torch.arange(len(self.hessian), device=order.device)
        if used_up and torch.equal(order, own):
            return factorize(self.hessian, self.damping, False, workers).upper
        some = self.hessian[order][:, order]
        if bool(
            (order.diff() < 0).any()
        ):  # of two rows of which the later comes first G lies in the lower triangle of this
            some = torch.where(order[:, None] <= order, some, some.T)
        return factorize(some, self.damping, False, workers).upper


class RowFeedback:
    """Of one linear."""

    def __init__(self, outputs: OutputHessian, order: Tensor, columns: int, workers: Workers) -> None:
        """``order``: all rows, of ``columns``, in the order in which they come. G is used up."""
        self._upper, self._workers = outputs.factor(order, workers, used_up=True), workers
        self._error, self._known = self._upper.new_empty(len(order), columns), 0

    def due(self, rows: int) -> Tensor:
        """What the next ``rows`` rows are to make up for, float32 ``(rows, columns)``."""
        start, columns = self._known, self._error.shape[1]
        found = self._error.new_zeros(rows, columns)
        if start:
            inside = self._upper[start : start + rows, start : start + rows]
            before = self._upper[:start, start : start + rows]
            share = torch.linalg.solve_triangular(inside, before, upper=True, left=False, unitriangular=True)
            error = self._error[:start]

            def part(some: tuple[int, int]) -> None:
                found[:, slice(*some)] = share.T @ error[:, slice(*some)]

            self._workers.map(part, pieces(columns, COLUMNS))
        return found

    def got_wrong(self, error: Tensor) -> None:
        """Say what became of these rows: W - Q, float32 ``(rows, columns)``."""
        self._error[self._known : self._known + len(error)] = error
        self._known += len(error)
