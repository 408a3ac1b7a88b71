"""Targets that make up for drift: what a linear should become because everything before it is quantized.

Let x be what a linear W reads in the unquantized model and x' what it reads behind quantized ones; r and r' the residual
streams that its outputs are added to, where they are. Instead of W x', the rounded linear W + S should give

    y = W x + r - r',    so that S x' = y - W x' =: m,

which in the least squares of the tokens' weights w, damped as the Hessian H = sum w x' x'^T is, has the solution

    S = M (H + lambda I)^-1,    M = sum w m x'^T

(Qronos, Zhang et al. 2025, arXiv 2505.11695; QEP, Arai and Ichikawa 2025, arXiv 2504.09629; with the residual term LoaQ, Lin
et al. 2025, arXiv 2509.06297). Few tokens fit noise. So M leaves some sequences out, and the share of S that is taken is the
one that would have been best for these: a = sum w m . S x' / sum w |S x'|^2, at least 0 and at most 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, pieces
from quern.quantization.rounding.factor import Factor

HELD_OUT = 8
"""Of so many sequences one is left out of M, and judges."""
MOST_JUDGES = 4096
"""Tokens that judge, at most."""
TOKENS = 512
"""Tokens that a worker multiplies at a time."""
ROWS = 1024
"""Rows that a worker solves for at a time."""


@dataclass(frozen=True)
class Reference:
    """What the unquantized model has, where the quantized one has a tap."""

    inputs: Tensor
    """What the linear reads in it, ``(tokens, columns)``, unrotated."""
    added: Tensor | None
    """r - r', float32 ``(tokens, rows)``; None where there is nothing that outputs are added to."""
    held: Tensor
    """Which tokens belong to sequences that are left out, bool ``(tokens,)``."""


@dataclass
class Drift:
    """What has been seen of one linear."""

    weight: Tensor
    """W ``(rows, columns)``, unrotated."""
    mismatch: Tensor
    """M, float32 ``(rows, columns)``, in the coordinates of the inputs that are rounded for."""
    judges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of tokens that judge: sqrt(w) m ``(tokens, rows)`` and sqrt(w) x' ``(tokens, columns)``, float32."""

    def add(
        self, inputs: Tensor, turned: Tensor, weights: Tensor | None, reference: Reference, workers: Workers
    ) -> None:
        """Add tokens: x' ``(tokens, columns)`` as it is, and as it is rounded for; their weights ``(tokens,)``."""

        def missing(part: tuple[int, int]) -> Tensor:
            some = slice(*part)
            change = reference.inputs[some].float() - inputs[some].float()
            found = (change.to(self.weight.dtype) @ self.weight.T).float()
            return found if reference.added is None else found + reference.added[some]

        mismatch = torch.cat(workers.map(missing, pieces(len(inputs), TOKENS)))
        root = None if weights is None else weights.to(mismatch.device).clamp(min=0).sqrt()[:, None]
        turned = turned.float()
        if root is not None:
            mismatch, turned = mismatch * root, turned * root
        seen = ~reference.held
        left, right = mismatch[seen], turned[seen]

        def sums(rows: tuple[int, int]) -> None:
            self.mismatch[slice(*rows)].addmm_(left[:, slice(*rows)].T, right)

        workers.map(sums, pieces(len(self.mismatch), ROWS))
        known = sum(len(one) for one, _ in self.judges)
        judging = reference.held.nonzero()[: MOST_JUDGES - known, 0]
        if len(judging):
            self.judges.append((mismatch[judging], turned[judging]))

    def shift(self, factor: Factor, workers: Workers) -> tuple[Tensor, float]:
        """a S float32 ``(rows, columns)``, what is to be added to the weight, and a; M is used up."""
        found = self.mismatch
        workers.map(lambda rows: _solve(found[slice(*rows)], factor), pieces(len(found), ROWS))
        share = self._share(found, workers)
        return found.mul_(share), share

    def _share(self, shift: Tensor, workers: Workers) -> float:
        gain = size = 0.0
        for mismatch, inputs in self.judges:
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
