"""The grids of ggml's types IQ2 and IQ3: a number stands for the sizes of 8 or 4 weights at once, and signs come on top.

The tables are facts of these types; the package ``gguf`` has them. None of their sizes is 0. Some types store only
seven signs of eight weights, the eighth being what makes the number of negative ones even, so that a grid's point and
the signs are to be chosen together: of eight weights z, the e = z - c of least e M e^T, with M what their errors
cost.

A sign differs from that of its weight only where this is small. So of the weights whose sign costs least to turn all
combinations are tried (``FLIPS``) with all points of the grid:

    e M e^T = z M z^T - 2 z M c^T + c M c^T,   c = s o g

with c M c^T of all signs s and points g once for all rows, and the middle as one matrix product. Points of 4 weights come
one after the other: the first by what its errors cost once the second makes up for them, the second towards what makes up
for them, for each of the best few first ones (``KEPT``), with an even and an odd number of negative signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quern.codecs.packing import ggml_points as layout

OCTET = 8
"""Weights whose signs lie together."""
FLIPS, FLIPS_EVEN = 2, 3
"""Weights whose signs may be turned: of types with all signs and with even ones. More gain less than a thousandth."""
KEPT = 4
"""First points of two that are gone on with, of each number of negative signs."""
CHUNK = 1 << 19
"""Points that are compared at a time, as many as a cache holds."""
FARTHEST = 2.0**12
"""From zero, in the grid's own units; weights beyond it get the greatest points whatever they are."""


@dataclass(frozen=True)
class PointType:
    """What one of these types is. A value is d x unit x (2 s + 1) x size, with d the super-block's number and s the
    sub-block's."""

    name: str
    width: int
    """Weights of a point."""
    point_bits: int
    group: int
    """Weights of a sub-block."""
    unit: float
    even: bool
    """Whether negative signs of eight weights are even in number, so that seven are stored."""
    pack: Callable[..., Tensor]

    @property
    def code_bits(self) -> int:
        """Of points and signs of eight weights."""
        return self.point_bits * (OCTET // self.width) + OCTET - self.even


TYPES = {
    one.name: one
    for one in (
        PointType("IQ2_XXS", 8, 8, 32, 0.125, True, layout.iq2_xxs),
        PointType("IQ2_XS", 8, 9, 16, 0.125, True, layout.iq2_xs),
        PointType("IQ2_S", 8, 10, 16, 0.125, False, layout.iq2_s),
        PointType("IQ3_XXS", 4, 8, 32, 0.25, True, layout.iq3_xxs),
        PointType("IQ3_S", 4, 9, 32, 1.0, False, layout.iq3_s),
    )
}


@cache
def grid_of(name: str, device: torch.device) -> PointGrid:
    """The grid of the type ``name``."""
    return PointGrid(TYPES[name], device)


@cache
def table_of(name: str) -> NDArray[np.int8]:
    """Sizes of the points of type ``name``, one after the other, as kernels read them: one array that all matrices share."""
    return grid_of(name, torch.device("cpu")).points.to(torch.int8).flatten().numpy()


def _sign_table(width: int, device: torch.device) -> Tensor:
    """1 and -1 of all patterns of signs, float32 ``(2^width, width)``."""
    return 1 - 2.0 * (torch.arange(1 << width, device=device)[:, None] >> torch.arange(width, device=device) & 1)


@dataclass(frozen=True)
class _Chosen:
    """Some points and signs for each of n tuples."""

    point: Tensor
    """int64 ``(n, some)``."""
    signs: Tensor
    """int64 ``(n, some)``, a bit for each weight."""
    values: Tensor
    """What they stand for, ``(n, some, width)``."""
    loss: Tensor
    """e M e^T, ``(n, some)``."""


class PointGrid:
    """The points of a type, and which are nearest. Values are in the grid's own units."""

    def __init__(self, kind: PointType, device: torch.device) -> None:
        from gguf import quants  # whoever has artifacts of other types does without it

        table = getattr(quants, kind.name)
        table.init_grid()
        self.kind, self.device = kind, device
        self.points = torch.from_numpy(table.grid.reshape(-1, kind.width)).to(device, torch.float32)
        self.squares = self.points.square()
        self.top = float(self.points.max())
        self.signs = _sign_table(kind.width, device)
        self.octet_signs = _sign_table(OCTET, device)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Places of pairs of weights, products of all signs ``(2^width, pairs)`` and of all sizes ``(pairs, points)``."""
        first, second = torch.triu_indices(self.kind.width, self.kind.width, device=self.device)
        sizes = (self.points[:, first] * self.points[:, second]).T.contiguous()
        return first, second, self.signs[:, first] * self.signs[:, second], sizes

    def decode(self, points: Tensor, signs: Tensor) -> Tensor:
        """``(..., 8)`` of points ``(..., 8 / width)`` and signs ``(...)``, both int64."""
        return self.points[points].flatten(-2) * self.octet_signs[signs]

    def near(self, values: Tensor, importance: Tensor) -> Tensor:
        """What stands for ``values`` ``(n, 8)`` whose squared errors cost ``importance`` ``(8,)``.

        Where signs are even the cheapest is turned afterwards, so that now and then something else is a little nearer."""
        sizes, found = values.abs().clamp(max=FARTHEST), torch.empty_like(values)
        for first in range(0, OCTET, self.kind.width):
            at = slice(first, first + self.kind.width)
            scores = torch.addmm(self.squares @ importance[at], sizes[:, at] * importance[at], self.points.T, alpha=-2)
            found[:, at] = self.points[scores.min(1).indices]  # faster than argmin
        negative = values < 0
        if self.kind.even:
            cheapest = (sizes * found * importance).argmin(1, keepdim=True)
            turned = (negative.sum(1, keepdim=True) % 2).bool()
            negative.scatter_(1, cheapest, negative.gather(1, cheapest) ^ turned)
        return torch.where(negative, -found, found)

    def nearest(self, values: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Points int64 ``(n, 8 / width)`` and signs int64 ``(n,)`` for ``values`` ``(n, 8)`` whose errors e cost e M e^T,
        with M = ``metric`` ``(8, 8)``."""
        values = values.clamp(-FARTHEST, FARTHEST)
        if self.kind.width == OCTET:
            found = self._best(values, metric, 0 if self.kind.even else None)
            return found.point, found.signs[:, 0]
        half = self.kind.width
        share = torch.linalg.solve(metric[half:, half:], metric[half:, :half]).T
        alone = metric[:half, :half] - share @ metric[half:, :half]
        points, signs, losses = [], [], []
        for odd in (0, 1) if self.kind.even else (None,):
            first = self._best(values[:, :half], alone, odd, KEPT)
            made_up = values[:, None, half:] + (values[:, None, :half] - first.values) @ share
            second = self._best(made_up.flatten(0, 1), metric[half:, half:], odd)
            points.append(torch.stack([first.point, second.point.view_as(first.point)], dim=2))
            signs.append(first.signs | second.signs.view_as(first.signs) << half)
            losses.append(first.loss + second.loss.view_as(first.loss))
        best = torch.cat(losses, dim=1).argmin(dim=1, keepdim=True)
        return (
            torch.cat(points, dim=1).gather(1, best[..., None].expand(-1, -1, 2))[:, 0],
            torch.cat(signs, dim=1).gather(1, best)[:, 0],
        )

    def _best(self, values: Tensor, metric: Tensor, odd: int | None, kept: int = 1) -> _Chosen:
        """The best ``kept`` for each of ``values`` ``(n, width)``; ``odd``: negative signs modulo 2, None: any."""
        first, second, signs, sizes = self._pairs
        weights = metric[first, second] * torch.where(first == second, 1.0, 2.0)
        costs = (signs * weights) @ sizes
        towards, patterns = values @ metric, self._patterns(values, metric, odd)
        count, tried = len(self.points), patterns.shape[1]
        best, least = [], []
        for some, turned in zip(*(torch.split(each, max(1, CHUNK // (tried * count))) for each in (towards, patterns)),
                                strict=True):  # fmt: skip
            signed = (some[:, None] * self.signs[turned]).flatten(0, 1)
            scores = costs.index_select(0, turned.flatten()).addmm_(signed, self.points.T, alpha=-2)
            scores = scores.view(len(some), -1)
            loss, place = scores.min(1, keepdim=True) if kept == 1 else scores.topk(kept, dim=1, largest=False)
            best.append(place)
            least.append(loss)
        place = torch.cat(best)
        point, pattern = place % count, patterns.gather(1, place // count)
        loss = torch.cat(least) + (towards * values).sum(1, keepdim=True)
        return _Chosen(point, pattern, self.points[point] * self.signs[pattern], loss)

    def _patterns(self, values: Tensor, metric: Tensor, odd: int | None) -> Tensor:
        """Signs that are tried, int64 ``(n, tried)``: those of the values, with any of the few turned that cost least;
        ``odd``: negative ones modulo 2, None: any."""
        flips = min(FLIPS if odd is None else FLIPS_EVEN, self.kind.width)
        negative, bits = values < 0, torch.arange(self.kind.width, device=self.device)
        own = (negative << bits).sum(1, keepdim=True)
        cheapest = (values.abs() * metric.diagonal()).argsort(dim=1, stable=True)[:, :flips]
        subsets = torch.arange(1 << flips, device=self.device)[:, None] >> torch.arange(flips, device=self.device) & 1
        masks = (1 << cheapest) @ subsets.T
        if odd is not None:
            even = subsets.sum(1) % 2 == 0
            turn = (negative.sum(1, keepdim=True) + odd) % 2 == 1
            masks = torch.where(turn, masks[:, ~even], masks[:, even])
        return own ^ masks
