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

from collections.abc import Sequence
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

    hessians: Sequence[Tensor]
    """Float32 ``(rows, rows)``, upper triangle: of each part of the rows, which parts know nothing of each other."""
    damping: float

    def factors(self, order: Tensor, workers: Workers, used_up: bool = False) -> list[Tensor]:
        """U float32 of the rows ``order``, part by part, in this order, which goes through one part after the other; of
        other rows it knows nothing. G may be ``used_up`` by it, which spares the copy of large ones."""
        found, start = [], 0
        for hessian in self.hessians:
            own = order[(order >= start) & (order < start + len(hessian))] - start
            start += len(hessian)
            if not (used_up and torch.equal(own, torch.arange(len(hessian), device=own.device))):
                some = hessian[own][:, own]
                # Of two rows of which the later comes first G lies in the lower triangle of this.
                backwards = bool((own.diff() < 0).any())
                hessian = torch.where(own[:, None] <= own, some, some.T) if backwards else some
            found.append(factorize(hessian, self.damping, False, workers).upper)
        return found


class RowFeedback:
    """Of one linear."""

    def __init__(self, outputs: OutputHessian, order: Tensor, columns: int, workers: Workers) -> None:
        """``order``: all rows, of ``columns``, in the order in which they come. G is used up."""
        self._uppers, self._workers = outputs.factors(order, workers, used_up=True), workers
        self._error, self._known = self._uppers[0].new_empty(len(order), columns), 0

    def due(self, rows: int) -> Tensor:
        """What the next ``rows`` rows are to make up for, float32 ``(rows, columns)``."""
        found, origin = self._error.new_zeros(rows, self._error.shape[1]), 0
        for upper in self._uppers:
            first = max(self._known, origin) - origin
            last = min(self._known + rows, origin + len(upper)) - origin
            if 0 < first < last:
                at = origin + first - self._known
                self._add_due(
                    upper[:last, first:last], self._error[origin : origin + first], found[at : at + last - first]
                )
            origin += len(upper)
        return found

    def _add_due(self, upper: Tensor, error: Tensor, found: Tensor) -> None:
        """What rows of one part are to make up for, by their columns of U and the ``error`` of those before them."""
        before, inside = upper[: len(error)], upper[len(error) :]
        share = torch.linalg.solve_triangular(inside, before, upper=True, left=False, unitriangular=True)

        def part(some: tuple[int, int]) -> None:
            found[:, slice(*some)] = share.T @ error[:, slice(*some)]

        self._workers.map(part, pieces(found.shape[1], COLUMNS))

    def got_wrong(self, error: Tensor) -> None:
        """Say what became of these rows: W - Q, float32 ``(rows, columns)``."""
        self._error[self._known : self._known + len(error)] = error
        self._known += len(error)
