"""The Hessian of a linear's squared output error: H = sum over tokens of weight x input input^T."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, fetched, pieces

TILE = 1024


def add_to_hessian(hessian: Tensor, inputs: Tensor, weights: Tensor | None, workers: Workers) -> None:
    """Add the tokens ``inputs`` ``(tokens, columns)``, weighted by ``weights`` ``(tokens,)``, to ``hessian``.

    ``hessian`` is float32 ``(columns, columns)``; only its upper triangle is kept. Products and sums are float32 whatever
    the dtype of the inputs, and their order depends on the sizes only.
    """
    rows = _weighted(inputs, weights)

    def tile(columns: tuple[int, int]) -> None:
        _add_to_tile(hessian[: columns[1], slice(*columns)], rows, columns)

    workers.map(tile, _tiles(hessian))


@dataclass(frozen=True)
class Run:
    """What ``add_to_hessian`` adds at a time."""

    inputs: Tensor
    """``(tokens, columns)``, as ``Workers.lend`` hands it out."""
    weights: Tensor | None
    """``(tokens,)``."""


def add_runs(hessians: Sequence[Tensor], runs: Sequence[Sequence[Run]], workers: Workers) -> None:
    """Make each of ``hessians``, zeros so far, what ``add_to_hessian`` of its ``runs`` in turn would; tiles may be made
    elsewhere."""
    tiles = [(hessian, own, part) for hessian, own in zip(hessians, runs, strict=True) for part in _tiles(hessian)]
    asked = [_Tile(part, len(hessian), own) for hessian, own, part in tiles]
    for (hessian, _, (start, stop)), found in zip(tiles, workers.spread(_sum_of_tile, None, asked), strict=True):
        hessian[:stop, start:stop] = found


@dataclass(frozen=True)
class _Tile:
    columns: tuple[int, int]
    of: int
    runs: Sequence[Run]


def _sum_of_tile(nothing: None, tile: _Tile) -> Tensor:
    start, stop = tile.columns
    found = torch.empty(stop, tile.of)[
        :, start:stop
    ].zero_()  # as far apart as in the whole, of which no more is touched
    for run in tile.runs:
        _add_to_tile(found, _weighted(fetched(run.inputs), run.weights), tile.columns)
    return found.contiguous()


def _tiles(hessian: Tensor) -> list[tuple[int, int]]:
    return list(reversed(pieces(len(hessian), TILE)))


def _weighted(inputs: Tensor, weights: Tensor | None) -> Tensor:
    rows = inputs.float()
    return rows if weights is None else rows * weights.to(rows.device).clamp(min=0).sqrt()[:, None]


def _add_to_tile(tile: Tensor, rows: Tensor, columns: tuple[int, int]) -> None:
    start, stop = columns
    tile.addmm_(rows[:, :stop].T, rows[:, start:stop])


def norm_weights(inputs: Tensor) -> Tensor:
    """Weights that scale every token ``(tokens, columns)`` to unit norm: 1 / |x_t|^2, zero for a zero token."""
    squares = inputs.float().square().sum(1)
    return torch.where(squares > 0, squares.reciprocal(), 0)
