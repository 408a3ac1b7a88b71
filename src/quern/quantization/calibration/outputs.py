"""Gradients at a linear's outputs: what feedback among rows goes by, and others that say how far it goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from quern.core.machine.parallel import Workers
from quern.quantization.calibration.hessian import add_to_hessian

MOST_JUDGES = 2048
"""Tokens that judge, at most."""


def bytes_of(rows: int) -> int:
    """What is kept of a linear of ``rows``, at most."""
    return 4 * rows * (rows + MOST_JUDGES)


@dataclass
class OutputStatistics:
    """What has been seen of one linear."""

    hessian: Tensor
    """G = sum over tokens of gradient gradient^T, float32 ``(rows, rows)``, upper triangle."""
    judges: list[Tensor] = field(default_factory=list)
    """Gradients float32 ``(tokens, rows)`` of tokens that are no part of it."""

    def add(self, gradients: Tensor, judge: bool, workers: Workers) -> None:
        """Add the gradients ``(tokens, rows)`` of a sequence, which is to ``judge`` or to be a part of G."""
        if not judge:
            add_to_hessian(self.hessian, gradients, None, workers)
        elif room := max(0, MOST_JUDGES - sum(map(len, self.judges))):
            self.judges.append(gradients[:room].float().clone())
