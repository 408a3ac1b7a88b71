"""The values that lose least, in one dimension: Lloyd's algorithm (Lloyd 1982, doi:10.1109/TIT.1982.1056489)."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 30
START_CELLS = 32
"""Pieces of equal weight for each value, from whose widths the first values are placed."""


def fit_tables(values: Tensor, importance: Tensor | None, count: int) -> Tensor:
    """The values that lose least, float64 ``(rows, count)``, ascending, for each row of float32 ``values`` ``(rows, n)``.

    ``importance`` ``(n,)``: what a squared error costs; None: all the same. Sums over sorted values make a step as cheap as
    finding where cells end. A value whose cell is empty goes to the end of the cell that loses most.
    """
    ordered, order = values.double().contiguous().sort(dim=1)
    weight = torch.ones_like(ordered) if importance is None else importance.double().clamp(min=0)[order]
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1.0)
    mass, first, second = (_running(weight * ordered**power) for power in range(3))
    table = _first_tables(ordered, mass, count)
    for _ in range(ITERATIONS):
        limits = (table[:, 1:] + table[:, :-1]) / 2
        ends = torch.searchsorted(ordered, limits.contiguous())
        ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], ordered.shape[1])], dim=1)
        filled, sums, squares = (running.gather(1, ends).diff(dim=1) for running in (mass, first, second))
        some = filled > 0
        moved = torch.where(some, sums / torch.where(some, filled, 1.0), table)
        lost = torch.where(some, squares - sums * moved, 0.0)
        _fill_one(moved, some, lost, ordered, mass, ends)
        moved = moved.sort(dim=1).values
        if torch.equal(moved, table):
            break
        table = moved
    return table


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... n of each row."""
    return torch.cat([torch.zeros_like(values[:, :1]), values.cumsum(1)], dim=1)


def _fill_one(table: Tensor, some: Tensor, lost: Tensor, ordered: Tensor, mass: Tensor, ends: Tensor) -> None:
    """Move one value of each row that has an empty cell to the last weight of the cell that loses most, if any loses."""
    most, worst = lost.max(dim=1, keepdim=True)
    scale = mass[:, -1:] * ordered.abs().amax(1, keepdim=True).square()
    wanted = (~some).any(1, keepdim=True) & (most > 1e-12 * scale)  # below, it is rounding errors of the sums
    if not bool(wanted.any()):
        return
    reached = mass.gather(1, ends.gather(1, worst + 1))
    last = torch.searchsorted(mass[:, 1:].contiguous(), reached).clamp(max=ordered.shape[1] - 1)
    empty = some.int().argmin(dim=1, keepdim=True)
    table.scatter_(1, empty, torch.where(wanted, ordered.gather(1, last), table.gather(1, empty)))


def _first_tables(ordered: Tensor, reached: Tensor, count: int) -> Tensor:
    """Values at equal steps of the cube root of the density, which is best where there are many (Panter and Dite 1951).

    The density is that of pieces of equal weight: inversely as wide.
    """
    total, cells = reached[:, -1:], count * START_CELLS
    steps = torch.linspace(0, 1, cells + 1, dtype=torch.float64, device=ordered.device)
    at = torch.searchsorted(reached[:, 1:].contiguous(), (steps * total).contiguous())
    edges = ordered.gather(1, at.clamp(max=ordered.shape[1] - 1))
    reach = (edges.diff(dim=1).clamp(min=0) ** (2 / 3)).cumsum(1)
    middles = (torch.arange(count, dtype=torch.float64, device=ordered.device) + 0.5) / count
    cell = torch.searchsorted(reach.contiguous(), (middles * reach[:, -1:]).contiguous()).clamp(max=cells - 1)
    return ((edges.gather(1, cell) + edges.gather(1, cell + 1)) / 2).sort(dim=1).values
