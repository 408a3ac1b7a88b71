"""What rounding with error feedback will lose on other text than that which it is calibrated on, before anything is rounded.

With H = U D U^T (``rounding/factor.py``) feedback gives row i an error e_i = n_i U^-1, where the entries of n_i are rounding
errors of single columns, as large as the row's values and whatever the other columns have. An input x that counts w then
costs E w (e_i . x)^2 = s_i w |U^-1 x|^2 in the mean. What few tokens do not show of the inputs is what U gets wrong, so this
falls as tokens are added, and tells when more of them gain no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers
from quern.quantization.rounding.factor import factorize


def expected_loss(hessian: Tensor, inputs: Tensor, damping: float, workers: Workers) -> float:
    """sum_t |U^-1 x_t|^2 of ``inputs`` ``(tokens, columns)``, each times the square root of what its token counts.

    ``hessian`` float32 ``(columns, columns)`` of the calibration tokens, whose upper triangle is read, stays as it is;
    ``damping`` is that of the rounding.
    """
    factor = factorize(hessian.clone(), damping, False, workers)

    def loss(part: Tensor) -> float:
        solved = torch.linalg.solve_triangular(factor.upper, part.T, upper=True, unitriangular=True)
        return float(solved.square().sum(dtype=torch.float64))

    return sum(workers.map(loss, list(torch.split(inputs, 256))))
