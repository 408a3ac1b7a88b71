"""How far feedback among rows goes; see ``rounding/row_feedback.py`` for the rule.

A few tokens have most of the gradient, and G can be theirs alone. So some take no part in it and judge. Rounding itself
gives row i an error n_i of variance s_i, whatever the others have; with feedback e = U^-T n comes of these, and a gradient g
then costs E (g . e)^2 = |S^1/2 U^-1 g|^2 in the mean, without it |S^1/2 g|^2. G is damped as these tokens like it best, and
is not used where they lose by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quern.codecs.base import Codec
from quern.core.machine.parallel import Workers
from quern.quantization.calibration.outputs import OutputStatistics
from quern.quantization.rounding.row_feedback import SETS, OutputHessian

DAMPINGS = (0.02, 0.1, 0.5, 2.0)
"""What may be added to the diagonal of G, as fractions of its mean: what few gradients do not show is not free."""
WORTH = 0.98
"""Of the judges' loss so much may be left, or feedback is not worth its time."""
JUDGED_ROWS = 2048
"""Rows that the judges look at, at most: others of a large matrix are left out evenly."""
JUDGES = 256
"""Tokens that a worker takes at a time."""


def damped(
    outputs: OutputStatistics, weight: Tensor, codec: Codec, workers: Workers
) -> tuple[OutputHessian | None, float]:
    """G as feedback among rows of ``weight`` ``(rows, columns)`` is to use it, and what that leaves of the judges' loss.

    None and 1: there is to be none.
    """
    order = torch.cat([some for some, _ in codec.row_sets(len(weight), SETS)])
    some = order[:: -(-len(order) // JUDGED_ROWS)]
    judges = [part[:, some].T for part in torch.split(torch.cat(outputs.judges), JUDGES)] if outputs.judges else []
    sizes = weight[some].float().square().mean(1)
    alone = sum(_loss(part, sizes) for part in judges)
    if not alone > 0:
        return None, 1.0
    found = []
    for damping in DAMPINGS:
        upper = _whole(OutputHessian(outputs.hessians, damping).factors(some, workers))

        def loss(part: Tensor, upper: Tensor = upper) -> float:
            return _loss(torch.linalg.solve_triangular(upper, part, upper=True, unitriangular=True), sizes)

        found.append((sum(workers.map(loss, judges)) / alone, damping))
    left, damping = min(found)
    return (OutputHessian(outputs.hessians, damping), left) if left < WORTH else (None, 1.0)


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """U of parts that know nothing of each other."""
    found = parts[0].new_zeros(sum(map(len, parts)), sum(map(len, parts)))
    start = 0
    for part in parts:
        found[start : start + len(part), start : start + len(part)] = part
        start += len(part)
    return found


def _loss(gradients: Tensor, sizes: Tensor) -> float:
    """sum_t |S^1/2 g_t|^2 of gradients ``(rows, tokens)``."""
    return float((gradients.square().sum(1) * sizes).sum(dtype=torch.float64))
