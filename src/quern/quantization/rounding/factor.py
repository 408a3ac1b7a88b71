"""H = U D U^T with U unit upper triangular: all that error feedback needs of the Hessian.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) takes the Cholesky factor of the inverse Hessian. Chee et al. 2023 (QuIP,
arXiv 2307.13304, theorem 6) show that it computes the same as feedback with the strictly upper part of U, so no inverse
is needed at all: one factorization of n^3/3 multiply-adds, done here in place and in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quern.core.errors import UserError
from quern.core.machine.parallel import Workers, pieces

PANEL = 256
TILE = 1024
SAMPLED_ROWS = 64
"""Rows of a slab from which tr(W H W^T) is estimated; the whole would cost as much as the rounding itself."""
SHIFTS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Tried in turn on the unit diagonal of a panel that rounding errors have made indefinite."""


class KeptHessian:
    """A symmetric matrix of which the upper triangle will be overwritten by its factorization.

    The rest of it has room for what must stay: tiles below those of the diagonal where they lie, these as copies.
    """

    def __init__(self, matrix: Tensor) -> None:
        """Of float32 ``matrix`` ``(columns, columns)`` the upper triangle is read, and all below it written."""
        self._matrix, self._corners = matrix, []
        for start, stop in pieces(len(matrix), TILE):
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T
            corner = matrix[start:stop, start:stop]
            self._corners.append(corner.triu() + corner.triu(1).T)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows and columns ``[start, stop)`` of it."""
        found = self._matrix.new_empty(stop - start, stop - start)
        for first, last, tile in self._cut(start, stop):
            for left, right, other in self._cut(start, stop):
                at = slice(first - start, last - start), slice(left - start, right - start)
                if tile == other:
                    corner = self._corners[tile // TILE]
                    found[at] = corner[first - tile : last - tile, left - tile : right - tile]
                elif tile > other:
                    found[at] = self._matrix[first:last, left:right]
                else:
                    found[at] = self._matrix[left:right, first:last].T
        return found

    def add_product(self, to: Tensor, start: int, stop: int, right: Tensor) -> None:
        """Add its columns ``[start, stop)`` times ``right`` ``(stop - start, rows)`` to ``to`` ``(columns, rows)``."""
        for first, last, tile in self._cut(start, stop):
            part, end = right[first - start : last - start], min(tile + TILE, len(self._matrix))
            to[:tile].addmm_(self._matrix[first:last, :tile].T, part)
            to[tile:end].addmm_(self._corners[tile // TILE][:, first - tile : last - tile], part)
            to[end:].addmm_(self._matrix[end:, first:last], part)

    def product(self, right: Tensor) -> Tensor:
        """It times ``right`` ``(columns, rows)``."""
        found = torch.zeros_like(right)
        for start, stop in pieces(len(right), TILE):
            self.add_product(found, start, stop, right[start:stop])
        return found

    def _cut(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """``[start, stop)`` cut where tiles end, with the first column of each tile."""
        tiles = range(start // TILE * TILE, stop, TILE)
        return [(max(start, tile), min(stop, tile + TILE), tile) for tile in tiles]


class UnusableHessianError(UserError):
    """Error feedback is not possible with what calibration counted; rounding to nearest is."""


@dataclass(frozen=True)
class Factor:
    """The factorization of a damped, perhaps reordered Hessian."""

    upper: Tensor
    """U, float32 ``(columns, columns)``; only the part above the diagonal is meant."""
    diagonal: Tensor
    """D, float32 ``(columns,)``."""
    order: Tensor | None
    """Columns in the order in which they are rounded (int64), or None for their own order."""
    hessian: KeptHessian | None = None
    """The damped Hessian, in the columns' own order, where it was to be kept."""


def factorize(hessian: Tensor, damping: float, activation_order: bool, workers: Workers, keep: bool = False) -> Factor:
    """Factorize float32 ``hessian`` ``(columns, columns)``, of which only the upper triangle is read; it is overwritten.

    ``damping`` times the mean of the diagonal is added to the diagonal. Inputs that never fire keep the
    damping alone, which makes them round to nearest. With ``keep`` the factor holds the damped Hessian too. Raises
    ``UnusableHessianError`` where the diagonal is not finite, or damping does not make the matrix positive definite.
    """
    diagonal = hessian.diagonal()
    # |x_i x_j| is never above the greater square: where anything overflows, the diagonal does.
    if not bool(diagonal.isfinite().all()):
        raise UnusableHessianError(
            "what calibration counts of a linear's inputs is not finite: the model's values are so large that their squares "
            "overflow float32. Check the checkpoint, or set rounding: {method: nearest}, which needs no calibration"
        )
    mean = float(diagonal.double().mean())
    diagonal.add_(damping * mean if mean > 0 else 1.0)
    kept = KeptHessian(hessian) if keep else None
    order = None
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        full = hessian.triu() + hessian.triu(1).T
        hessian = full[order][:, order]
        diagonal = hessian.diagonal()
    # A unit diagonal is the best conditioning that scaling can give (van der Sluis 1969).
    scale = diagonal.rsqrt()
    for start, stop in pieces(len(hessian), TILE):
        hessian[:stop, start:stop] *= scale[:stop, None] * scale[None, start:stop]
    _cholesky_upper(hessian, workers)
    root = hessian.diagonal().clone()
    for start, stop in pieces(len(hessian), TILE):
        hessian[:stop, start:stop] *= (scale / root)[None, start:stop] / scale[:stop, None]
    return Factor(hessian, (root / scale).square_().contiguous(), order, kept)


def _cholesky_upper(matrix: Tensor, workers: Workers) -> None:
    """Overwrite the upper triangle of a positive definite matrix of unit diagonal by upper R with R R^T = matrix."""
    for start, stop in reversed(pieces(len(matrix), PANEL)):
        corner = _cholesky_corner(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = corner
        if start == 0:
            return
        side = matrix[:start, start:stop]
        solved = torch.linalg.solve_triangular(corner.T, side, upper=False, left=False)
        side.copy_(solved)

        def update(columns: tuple[int, int], solved: Tensor = solved) -> None:
            first, last = columns
            matrix[:last, first:last].addmm_(solved[:last], solved[first:last].T, alpha=-1)

        workers.map(update, pieces(start, TILE))


def _cholesky_corner(corner: Tensor) -> Tensor:
    """Upper R with R R^T = corner: the ordinary (lower) factor of the matrix with rows and columns reversed."""
    full = (corner.triu() + corner.triu(1).T).double().flip(0, 1)
    for shift in SHIFTS:
        lower, failed = torch.linalg.cholesky_ex(
            full + shift * torch.eye(len(full), dtype=full.dtype, device=full.device)
        )
        if not failed:
            upper: Tensor = lower.flip(0, 1).to(torch.float32)
            return upper
    raise UnusableHessianError(
        "the Hessian of a linear's inputs is not positive definite even after damping. Set rounding: {damping: ...} to "
        "more, or rounding: {method: nearest}, which needs no calibration"
    )


def quadratic_size(weight: Tensor, factor: Factor) -> float:
    """tr(W H W^T) = sum_k D_k |(W U)_k|^2 of float32 ``weight`` ``(rows, columns)``, estimated from evenly spaced rows."""
    rows, columns = weight.shape
    weight = weight if factor.order is None else weight[:, factor.order]
    step = -(-rows // SAMPLED_ROWS)
    sample = weight[::step]
    total = 0.0
    for start in range(0, columns, 1024):
        stop = min(start + 1024, columns)
        corner = factor.upper[start:stop, start:stop].triu(1)
        product = (
            sample[:, start:stop]
            + sample[:, :start] @ factor.upper[:start, start:stop]
            + sample[:, start:stop] @ corner
        )
        total += float(product.square().sum(0).double() @ factor.diagonal[start:stop].double())
    return total * rows / len(sample)
