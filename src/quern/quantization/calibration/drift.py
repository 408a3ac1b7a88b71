"""Drift: what a linear's inputs have become because everything before it is quantized, and what it should become for it.

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

from quern.core.machine import products
from quern.core.machine.parallel import Workers, pieces

HELD_OUT = 8
"""Of so many sequences one is left out of M, and judges."""
MOST_JUDGES = 4096
"""Tokens that judge, at most."""
TOKENS = 512
"""Tokens that a worker multiplies at a time."""
ROWS = 1024
"""Rows that a worker adds up at a time."""


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
    moved: Tensor | None = None
    """What the linear is before it is rounded where that is not W: S is added to it, and m is what it lacks."""
    judges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of tokens that judge: sqrt(w) m ``(tokens, rows)`` and sqrt(w) x' ``(tokens, columns)``, float32."""

    def add(
        self, inputs: Tensor, turned: Tensor, weights: Tensor | None, reference: Reference, workers: Workers
    ) -> None:
        """Add tokens: x' ``(tokens, columns)`` as it is, and as it is rounded for; their weights ``(tokens,)``."""

        def missing(part: tuple[int, int]) -> Tensor:
            some = slice(*part)
            if self.moved is None:
                change = reference.inputs[some].float() - inputs[some].float()
                found = products.linear(change.to(self.weight.dtype), self.weight).float()
            else:
                found = (
                    products.linear(reference.inputs[some], self.weight).float()
                    - products.linear(inputs[some], self.moved).float()
                )
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
