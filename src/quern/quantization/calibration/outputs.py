"""Gradients at a linear's outputs: what feedback among rows goes by, and others that say how far it goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, pieces
from quern.quantization.calibration.hessian import add_to_hessian

MOST_JUDGES = 2048
"""Tokens that judge, at most."""


MOST_ROWS = 8192
"""Rows that make up for one another, at most: of a larger matrix each half, or third, has a Hessian of its own."""


def parts_of(rows: int) -> list[tuple[int, int]]:
    """The rows that make up for one another."""
    return pieces(rows, -(-rows // -(-rows // MOST_ROWS)))


def bytes_of(rows: int) -> int:
    """What is kept of a linear of ``rows``, at most."""
    return 4 * (rows * MOST_JUDGES + sum((stop - start) ** 2 for start, stop in parts_of(rows)))


@dataclass
class OutputStatistics:
    """What has been seen of one linear."""

    hessians: list[Tensor]
    """Of each of the parts G = sum over tokens of gradient gradient^T, float32 ``(rows, rows)``, upper triangle."""
    judges: list[Tensor] = field(default_factory=list)
    """Gradients float32 ``(tokens, rows)`` of tokens that are no part of it."""

    @classmethod
    def of(cls, rows: int, device: torch.device) -> OutputStatistics:
        """Nothing seen yet."""
        return cls([torch.zeros(stop - start, stop - start, device=device) for start, stop in parts_of(rows)])

    def add(self, gradients: Tensor, judge: bool, workers: Workers) -> None:
        """Add the gradients ``(tokens, rows)`` of a sequence, which is to ``judge`` or to be a part of G."""
        if not judge:
            for hessian, (start, stop) in zip(self.hessians, parts_of(gradients.shape[1]), strict=True):
                add_to_hessian(hessian, gradients[:, start:stop], None, workers)
        elif room := max(0, MOST_JUDGES - sum(map(len, self.judges))):
            self.judges.append(gradients[:room].float().clone())
