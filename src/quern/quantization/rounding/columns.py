"""Columns of a block that are rounded one after the other: plainly, for every encoder, and natively for those on grids.

``gptq`` and ``sweeps`` say what is computed. The native loops (``csrc/rounding``) add up the same numbers in float32 in
another order, so that they are for what was not made plainly before: bytes of matrices rounded whole stay as they are.
All matrices have a column of the weight as a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from quern.codecs.base import Encoder, NativeColumns


class BlockLoop(ABC):
    """Rounds columns ``[first, last)`` of a block, whose numbers in the matrix it was made with."""

    @abstractmethod
    def feed_forward(
        self, first: int, last: int, inside: Tensor, original: Tensor, target: Tensor, done: Tensor, rounded: Tensor
    ) -> None:
        """Round w'_k = target_k + sum_{j < k} inside_kj done_j.

        ``inside`` ``(columns, columns)``, the others ``(columns, rows)``: ``original`` W; ``target``, which becomes
        w'_k - q_k; ``done`` becomes W - Q and ``rounded`` Q.
        """

    @abstractmethod
    def sweep(self, first: int, last: int, hessian: Tensor, rounded: Tensor, residual: Tensor) -> None:
        """Round anew towards q_k - r_k / H_kk, and move R = ``residual`` by what changes.

        ``hessian`` ``(columns, columns)``, the others ``(columns, rows)``.
        """


class PlainLoop(BlockLoop):
    """Column by column through ``Encoder.round``; what the other is judged by."""

    def __init__(self, encoder: Encoder, places: Sequence[int]) -> None:
        self.encoder, self.places = encoder, places

    def feed_forward(
        self, first: int, last: int, inside: Tensor, original: Tensor, target: Tensor, done: Tensor, rounded: Tensor
    ) -> None:
        for k in range(first, last):
            value = torch.addmv(target[k], done[:k].T, inside[k, :k])
            stored = self.encoder.round(self.places[k], value[None])[0]
            torch.sub(original[k], stored, out=done[k])
            rounded[k] = stored
            target[k] = value.sub_(stored)

    def sweep(self, first: int, last: int, hessian: Tensor, rounded: Tensor, residual: Tensor) -> None:
        if self.encoder.width > 1:
            self._sweep_tuples(first, last, hessian, rounded, residual)
            return
        for k in range(first, last):
            wanted = rounded[k] - residual[k] / hessian[k, k]
            found = self.encoder.round(self.places[k], wanted[None])[0]
            residual.addr_(hessian[:, k], found - rounded[k])
            rounded[k] = found

    def _sweep_tuples(self, first: int, last: int, hessian: Tensor, rounded: Tensor, residual: Tensor) -> None:
        """The same with H_kk the block of a tuple, which is the metric of its errors too."""
        for k in range(first, last, self.encoder.width):
            at = slice(k, min(k + self.encoder.width, last))
            inner = hessian[at, at].contiguous()
            wanted = rounded[at] - torch.linalg.solve(inner, residual[at])
            found = self.encoder.round_within(self.places[k], wanted, inner)
            residual.addmm_(hessian[:, at], found - rounded[at])
            rounded[at] = found


class NativeLoop(BlockLoop):
    """All columns in one call."""

    def __init__(self, columns: NativeColumns, places: Sequence[int]) -> None:
        self.columns, self.places = columns, torch.tensor(places, dtype=torch.int32).numpy()

    def feed_forward(
        self, first: int, last: int, inside: Tensor, original: Tensor, target: Tensor, done: Tensor, rounded: Tensor
    ) -> None:
        weights, before = inside.numpy(), original.numpy()
        self.columns.feed_forward(
            self.places, first, last, weights, before, target.numpy(), done.numpy(), rounded.numpy()
        )

    def sweep(self, first: int, last: int, hessian: Tensor, rounded: Tensor, residual: Tensor) -> None:
        weights = hessian.contiguous().numpy()
        self.columns.sweep(self.places, first, last, weights, rounded.numpy(), residual.numpy())


def loop_of(encoder: Encoder, places: Sequence[int], native: bool) -> BlockLoop:
    """The loop over the columns ``places``; a ``native`` one if the encoder has one."""
    columns = encoder.native_columns() if native else None
    return PlainLoop(encoder, places) if columns is None else NativeLoop(columns, places)
