"""Sweeps: every column rounded anew with all others as they are, and scales refitted, under the full Hessian.

Error feedback rounds a column knowing those before it; a sweep knows those behind it too. With W the target, Q the rounded
weights, E = Q - W and R = E H, moving column k of Q by d changes the loss tr(E H E^T) by 2 d . r_k + H_kk |d|^2, so that the
codes nearest to

    q_k - r_k / H_kk

lose least (coordinate descent; compare Chee et al. 2023 (QuIP), arXiv 2307.13304, and Kim et al. 2025 (LNQ), arXiv
2505.07004). Where columns q_g of a row share a scale, multiplying it by 1 + a changes the loss by
2 a q_g . r_g + a^2 q_g H_gg q_g^T, which is least at a = -q_g . r_g / (q_g H_gg q_g^T). Where they share whole numbers, as
sub-blocks of ggml's super-blocks do, numbers that are one more or less change q_g by d and the loss by
2 d . r_g + d H_gg d^T, and the neighbour that lowers it most is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quern.codecs.base import Encoder
from quern.core.machine.parallel import pieces
from quern.quantization.rounding.columns import loop_of
from quern.quantization.rounding.factor import KeptHessian

BLOCK = 128
"""Columns between two matrix products."""


def sweep(target: Tensor, decoded: Tensor, encoder: Encoder, hessian: KeptHessian, times: int) -> float:
    """Go over the columns of a slab ``times`` times.

    ``target`` and ``decoded`` float32 ``(rows, columns)``: what was rounded, and what became of it; ``encoder`` holds its
    codes and is left with the new ones. ``hessian``: damped. Returns tr(E H E^T).
    """
    # Transposed, so that one column of the weight is one contiguous row.
    rounded = decoded.T.contiguous()
    residual = hessian.product(rounded - target.T)
    for _ in range(times):
        for start, stop in _blocks(len(rounded), encoder):
            before = rounded[start:stop].clone()
            _sweep_block(rounded[start:stop], residual[start:stop], encoder, hessian.block(start, stop), start)
            moved = rounded[start:stop] - before
            inside = residual[start:stop].clone()
            hessian.add_product(residual, start, stop, moved)
            residual[start:stop] = inside
        if encoder.rescale_width is not None and encoder.rescale_width >= len(rounded):
            _rescale(rounded, residual, encoder, hessian, 0)
    # R has gone along with every move: E H once more would cost as much as half of the sweep.
    return float(((rounded - target.T) * residual).sum(dtype=torch.float64))


def _blocks(columns: int, encoder: Encoder) -> list[tuple[int, int]]:
    """Blocks that do not cut what shares a scale, unless all columns do."""
    width = encoder.rescale_width or encoder.step_width
    size = BLOCK if width is None or width >= columns else max(1, BLOCK // width) * width
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def _sweep_block(rounded: Tensor, residual: Tensor, encoder: Encoder, hessian: Tensor, first: int) -> None:
    """The columns of a block, of which all arguments are the part; ``first`` is its first column."""
    columns, width = len(rounded), encoder.rescale_width or encoder.step_width
    loop = loop_of(encoder, range(first, first + columns), native=True)
    own = width is not None and width <= columns
    for k, last in pieces(columns, width if width is not None and own else columns):
        if own:
            group = slice(k, last)
            change = _rescaled if encoder.rescale_width is not None else _stepped
            moved = change(rounded[group], residual[group], encoder, hessian[group, group], first + k)
            rounded[group] += moved
            residual.addmm_(hessian[:, group], moved)
        loop.sweep(k, last, hessian, rounded, residual)


def _rescaled(rounded: Tensor, residual: Tensor, encoder: Encoder, hessian: Tensor, first: int) -> Tensor:
    """What a factor for each row adds to columns that share a scale."""
    return (encoder.rescale(first, _least(rounded, residual, hessian @ rounded)) - 1) * rounded


def _stepped(rounded: Tensor, residual: Tensor, encoder: Encoder, hessian: Tensor, first: int) -> Tensor:
    """What the best neighbour of each row's whole numbers adds to columns that share them."""
    moves = encoder.neighbours(first) - rounded
    change = (moves * (2 * residual + hessian @ moves)).sum(1)
    least, choice = change.min(0)
    choice = torch.where(least < 0, choice, -1)
    encoder.adopt(first, choice)
    chosen = moves.gather(0, choice.clamp(min=0).expand(1, len(rounded), -1))[0]
    return torch.where(choice >= 0, chosen, 0.0)


def _rescale(rounded: Tensor, residual: Tensor, encoder: Encoder, hessian: KeptHessian, first: int) -> None:
    """One factor for each whole row."""
    product = hessian.product(rounded)
    ratio = encoder.rescale(first, _least(rounded, residual, product))
    residual += (ratio - 1) * product
    rounded *= ratio


def _least(rounded: Tensor, residual: Tensor, product: Tensor) -> Tensor:
    """The factors ``(rows,)`` of least loss; ``product``: H times the rounded columns that share a scale."""
    size = (rounded * product).sum(0)
    factor = 1 - (rounded * residual).sum(0) / size
    return torch.where((size > 0) & (factor > 0.5) & (factor < 2), factor, 1.0)
