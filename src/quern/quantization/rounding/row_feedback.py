"""Feedback among rows: what rows already rounded got wrong, those behind them make up for.

To second order the errors E of a linear cost sum_t (g_t . E x_t)^2 / 2 with g_t the gradient of the loss at its outputs.
Taken apart as two Hessians, that of the inputs H and that of the outputs G = sum_t g_t g_t^T, this is tr(G E H E^T) (YAQA,
Tseng et al. 2025, arXiv 2505.22988, section 3). With G = U D U^T, U unit upper triangular, rows are to be rounded towards

    w'_i = w_i + sum_{j < i} U_ji (w_j - q_j)

as columns are by ``gptq`` (there row by row, here a row with all its columns). Rows of a set are rounded together, each with
feedback among its columns; for sets U is divided by what lies within them, so that what they are rounded towards counts all
rows of the set at once.

A few tokens have most of the gradient, and G can be theirs alone. So some take no part in it and judge. Rounding itself
gives row i an error n_i of variance s_i, whatever the others have; with feedback e = U^-T n comes of these, and a gradient g
then costs E (g . e)^2 = |S^1/2 U^-1 g|^2 in the mean, without it |S^1/2 g|^2. G is damped as these tokens like it best, and
is not used where they lose by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, pieces
from quern.quantization.calibration.outputs import OutputStatistics
from quern.quantization.rounding.factor import factorize

DAMPINGS = (0.02, 0.1, 0.5, 2.0)
"""What may be added to the diagonal of G, as fractions of its mean: what few gradients do not show is not free."""
WORTH = 0.98
"""Of the judges' loss so much may be left, or feedback is not worth its time."""
JUDGED_ROWS = 2048
"""Rows that the judges look at, at most: others of a large matrix are left out evenly."""
JUDGES = 256
"""Tokens that a worker takes at a time."""
SETS = 16
"""Sets of rows of a matrix, about: of m sets all but 1 / m of what feedback can gain is gained."""
COLUMNS = 1024
"""Columns that a worker multiplies at a time."""


class RowFeedback:
    """Of one linear."""

    def __init__(self, hessian: Tensor, order: Tensor, damping: float, workers: Workers) -> None:
        """``hessian``: G float32 ``(rows, rows)``, upper triangle. ``order``: all rows in the order in which they come."""
        self._upper, self._workers = factorize(_ordered(hessian, order), damping, False, workers).upper, workers
        self._error: list[Tensor] = []

    def due(self, rows: int, columns: int) -> Tensor:
        """What the next ``rows`` rows are to make up for, float32 ``(rows, columns)``."""
        start = sum(map(len, self._error))
        found = torch.zeros(rows, columns, device=self._upper.device)
        if start:
            inside = self._upper[start : start + rows, start : start + rows]
            before = self._upper[:start, start : start + rows]
            share = torch.linalg.solve_triangular(inside, before, upper=True, left=False, unitriangular=True)
            error = torch.cat(self._error)

            def part(some: tuple[int, int]) -> None:
                found[:, slice(*some)] = share.T @ error[:, slice(*some)]

            self._workers.map(part, pieces(columns, COLUMNS))
        return found

    def got_wrong(self, error: Tensor) -> None:
        """Say what became of these rows: W - Q, float32 ``(rows, columns)``."""
        self._error.append(error)


def best_damping(
    outputs: OutputStatistics, weight: Tensor, order: Tensor, workers: Workers
) -> tuple[float, float] | None:
    """The damping of G and what it leaves of the judges' loss, for ``weight`` ``(rows, columns)``; None: no feedback."""
    some = order[:: -(-len(order) // JUDGED_ROWS)]
    judges = [part[:, some].T for part in torch.split(torch.cat(outputs.judges), JUDGES)] if outputs.judges else []
    sizes = weight[some].float().square().mean(1)
    alone = sum(_loss(part, sizes) for part in judges)
    if not alone > 0:
        return None
    found = []
    for damping in DAMPINGS:
        upper = factorize(_ordered(outputs.hessian, some), damping, False, workers).upper

        def loss(part: Tensor, upper: Tensor = upper) -> float:
            return _loss(torch.linalg.solve_triangular(upper, part, upper=True, unitriangular=True), sizes)

        found.append((sum(workers.map(loss, judges)) / alone, damping))
    left, damping = min(found)
    return (damping, left) if left < WORTH else None


def _loss(gradients: Tensor, sizes: Tensor) -> float:
    """sum_t |S^1/2 g_t|^2 of gradients ``(rows, tokens)``."""
    return float((gradients.square().sum(1) * sizes).sum(dtype=torch.float64))


def _ordered(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns ``order`` of the symmetric matrix of which ``hessian`` is the upper triangle."""
    return (hessian.triu() + hessian.triu(1).T)[order][:, order]
