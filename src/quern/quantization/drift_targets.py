"""What is to be added to a linear's weights so that it makes up for drift; see ``calibration/drift.py`` for the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quern.core.errors import UserError
from quern.core.machine.parallel import Workers, pieces
from quern.quantization.calibration.drift import TOKENS, Drift
from quern.quantization.rounding.factor import Factor

ROWS = 1024
"""Rows that a worker solves for at a time."""


def shift_of(drift: Drift, factor: Factor, workers: Workers) -> tuple[Tensor, float]:
    """a S float32 ``(rows, columns)``, what is to be added to the weight, and a; M is used up. Raises ``UserError`` where
    S is not finite."""
    found = drift.mismatch
    workers.map(lambda rows: _solve(found[slice(*rows)], factor), pieces(len(found), ROWS))
    share = _share(drift, found, workers)
    if not math.isfinite(share * float(found.sum(dtype=torch.float64))):
        raise UserError(
            "what would make up for drift is not finite: the model's values are so large that their squares overflow "
            "float32. Check the checkpoint, or set rounding: {target: own}, which does without"
        )
    return found.mul_(share), share


def _share(drift: Drift, shift: Tensor, workers: Workers) -> float:
    """a: the share of ``shift`` that would have been best for the tokens that judge."""
    gain = size = 0.0
    for mismatch, inputs in drift.judges:
        made = torch.cat(workers.map(lambda part: part @ shift.T, list(torch.split(inputs, TOKENS))))
        gain += float((made * mismatch).sum(dtype=torch.float64))
        size += float(made.square().sum(dtype=torch.float64))
    return min(max(gain / size, 0.0), 1.0) if size > 0 else 0.0


def _solve(mismatch: Tensor, factor: Factor) -> None:
    """Rows of M become rows of M H^-1, with H = U D U^T of columns in the factor's order."""
    order = factor.order
    given = mismatch if order is None else mismatch[:, order]
    found = torch.linalg.solve_triangular(factor.upper.T, given, upper=False, left=False, unitriangular=True)
    found = torch.linalg.solve_triangular(
        factor.upper, found / factor.diagonal, upper=True, left=False, unitriangular=True
    )
    if order is None:
        mismatch.copy_(found)
    else:
        mismatch[:, order] = found
