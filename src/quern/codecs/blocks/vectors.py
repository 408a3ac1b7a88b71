"""Types whose weights are points of a grid, eight or four at a time: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

A super-block of 256 weights has a float16 number d, each of its sub-blocks a whole number s of four bits, and a
weight is read as d x unit x (2 s + 1) times the signed size that its point gives it (``points``). The numbers are
fitted as those of the other super-blocks are (``super``): to the columns as error feedback has left them, weighted by
what errors in each cost, and a sub-block's once more just before its first column. Eight columns are then rounded at
a time, by what their errors cost together.

Parts: ``codes`` int32, of eight weights points and above them signs, densely packed; ``scales`` int32, packed along
the row; ``scale`` float16 ``(rows, super-blocks)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from quern.codecs.base import Codec, Described, Encoder, KernelForm, Parts, nearest_scale
from quern.codecs.blocks.grids import half, parameters, refuse_overflow
from quern.codecs.blocks.points import OCTET, PointGrid, PointType, grid_of, table_of
from quern.codecs.packing import bits as dense
from quern.codecs.packing.ggml import GgmlBlocks, GgmlForm, half_bytes
from quern.codecs.packing.ggml_super import BLOCK
from quern.core.scheme import CodecScheme

HALF = torch.float16
SCALE_BITS = 4
MOST = (1 << SCALE_BITS) - 1
STARTS = (0.65, 0.8, 0.95, 1.15)
"""First scales of a sub-block: what its greatest weight is of the grid's greatest size."""
STEPS = 2
"""How often points and scale follow each other."""
ROUNDS = 2
"""How often the numbers of a super-block are fitted to its points."""
PADDING = 0.01
"""What an error in a column that is not there costs, of the mean of those that are; a little more for each."""


@dataclass
class _Fit:
    """Numbers of one super-block of some rows."""

    whole: Tensor
    """Float32 ``(rows, sub-blocks)``."""
    d: Tensor
    """Float32 ``(rows, 1)``."""


class PointFitter:
    """Scales of ``(rows, sub-blocks, width)`` by weighted least squares; ``importance`` is ``(sub-blocks, width)``."""

    def __init__(self, kind: PointType, grid: PointGrid) -> None:
        self.kind, self.grid = kind, grid

    def scale(self, d: Tensor, whole: Tensor) -> Tensor:
        """What sizes are multiplied by."""
        return d * self.kind.unit * (2 * whole + 1)

    def sizes(self, values: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
        """Signed sizes that are near at ``scale`` ``(rows, sub-blocks)``."""
        _, subs, width = values.shape
        given, found = values / scale[..., None], torch.empty_like(values)
        for sub in range(subs):
            for first in range(0, width, OCTET):
                at = slice(first, first + OCTET)
                found[:, sub, at] = self.grid.near(given[:, sub, at], importance[sub, at])
        return found

    def losses(self, values: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
        """What each sub-block loses, ``(rows, sub-blocks)``."""
        rounded = self.sizes(values, scale, importance) * scale[..., None]
        return ((rounded - values).square_() * importance).sum(-1)

    def free(self, values: Tensor, importance: Tensor) -> Tensor:
        """Scales of any size, above 0, ``(rows, sub-blocks)``."""
        greatest = values.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny * 1e6) / self.grid.top
        best, least = greatest, torch.full_like(greatest, torch.inf)
        for start in STARTS:
            scale = greatest * start
            for _ in range(STEPS):
                sizes = self.sizes(values, scale, importance)
                fresh = (values * sizes * importance).sum(-1) / (sizes.square() * importance).sum(-1)
                scale = torch.where(fresh.isfinite() & (fresh > 0), fresh, scale)
            loss = self.losses(values, scale, importance)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
        return best

    def fitted(self, values: Tensor, importance: Tensor) -> _Fit:
        """The numbers of a super-block."""
        scale = self.free(values, importance)
        d = half(scale.amax(1, keepdim=True) / (self.kind.unit * (2 * MOST + 1)))
        found = _Fit(((scale / (d * self.kind.unit) - 1) / 2).round_().clamp_(0, MOST), d)
        for _ in range(ROUNDS):
            self._refit(found, values, importance)
            found.whole = self.stepped(found, values, importance, (0, 1, -1))
        return found

    def _refit(self, found: _Fit, values: Tensor, importance: Tensor) -> None:
        """The super-block's number by least squares for the points that are near now, where that loses less."""
        scale = self.scale(found.d, found.whole)
        step = self.sizes(values, scale, importance) * (scale / found.d)[..., None]
        fresh = (values * step * importance).sum((1, 2)) / (step.square() * importance).sum((1, 2))
        d = half(torch.where(fresh.isfinite() & (fresh > 0), fresh, found.d[:, 0]))[:, None]
        before = self.losses(values, scale, importance).sum(1, keepdim=True)
        after = self.losses(values, self.scale(d, found.whole), importance).sum(1, keepdim=True)
        found.d = torch.where(after < before, d, found.d)

    def stepped(self, found: _Fit, values: Tensor, importance: Tensor, steps: tuple[int, ...]) -> Tensor:
        """Whole numbers, of those so many ``steps`` from what they are, at which sub-blocks lose least."""
        best, least = found.whole, torch.full_like(found.whole, torch.inf)
        for step in steps:
            whole = (found.whole + step).clamp(0, MOST)
            loss = self.losses(values, self.scale(found.d, whole), importance)
            best, least = torch.where(loss < least, whole, best), torch.minimum(loss, least)
        return best


class PointEncoder(Encoder):
    """Fits the numbers of each super-block to its columns, and rounds eight columns at a time onto the grid."""

    width = OCTET
    heeds_metric = True

    def __init__(self, kind: PointType, weight: Tensor, refit: bool) -> None:
        rows, columns = weight.shape
        self.kind, self.grid = kind, grid_of(kind.name, weight.device)
        self.fitter = PointFitter(kind, self.grid)
        octets, groups, supers = (-(-columns // size) for size in (OCTET, kind.group, BLOCK))
        # Transposed, so that what is rounded at a time lies together.
        self.points = weight.new_zeros(octets, rows, OCTET // kind.width, dtype=torch.int64)
        self.signs = weight.new_zeros(octets, rows, dtype=torch.int64)
        self.whole, self.d = weight.new_zeros(groups, rows), weight.new_ones(supers, rows)
        if refit:
            self.refit_width, self.refine_width = BLOCK, kind.group
        else:
            for first in range(0, columns, BLOCK):
                values = weight[:, first : first + BLOCK]
                self.refit(first, values.T, values.new_ones(values.shape[1]))

    def _split(self, values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Columns as ``(rows, sub-blocks, width)``, and their importance; of columns that are not there it is 0."""
        missing = -len(values) % self.kind.group
        weights = pad(importance.to(values.dtype), (0, missing)).view(-1, self.kind.group)
        return pad(values.T, (0, missing)).contiguous().view(values.shape[1], -1, self.kind.group), weights

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:
        parts, weights = self._split(values, importance)
        found = self.fitter.fitted(parts, weights)
        refuse_overflow(values, found.d)
        first = first_column // self.kind.group
        self.whole[first : first + parts.shape[1]] = found.whole.T
        self.d[first_column // BLOCK] = found.d[:, 0]

    def refine(self, first_column: int, values: Tensor, importance: Tensor) -> None:
        """The whole number of one sub-block, for the super-block's number as it is."""
        parts, weights = self._split(values, importance)
        group = first_column // self.kind.group
        found = _Fit(torch.zeros_like(parts[..., 0]), self.d[first_column // BLOCK][:, None])
        self.whole[group] = self.fitter.stepped(found, parts, weights, tuple(range(MOST + 1)))[:, 0]

    def round(self, first: int, values: Tensor) -> Tensor:
        return self.round_within(first, values, torch.eye(len(values), device=values.device))

    def round_within(self, first: int, values: Tensor, metric: Tensor) -> Tensor:
        """See ``Encoder.round_within``; what is stored already stays where nothing nearer is found."""
        place, there = first // OCTET, len(values)
        scale = self.fitter.scale(self.d[first // BLOCK], self.whole[first // self.kind.group])
        given = pad(values.T / scale[:, None], (0, OCTET - there), value=float(self.grid.points.min()))
        metric = _widened(metric / metric.diagonal().mean(), OCTET)
        points, signs = self.grid.nearest(given, metric)
        sizes = self.grid.decode(points, signs)
        former = self.grid.decode(self.points[place], self.signs[place])
        worse = _cost(given - former, metric) < _cost(given - sizes, metric)
        self.points[place] = torch.where(worse[:, None], self.points[place], points)
        self.signs[place] = torch.where(worse, self.signs[place], signs)
        return (torch.where(worse[:, None], former, sizes) * scale[:, None])[:, :there].T

    def parts(self) -> Parts:
        bits = self.kind.point_bits
        shifts = bits * torch.arange(self.points.shape[2] + 1, device=self.points.device)
        signs = self.signs & 127 if self.kind.even else self.signs
        codes = (torch.cat([self.points, signs[..., None]], dim=2) << shifts).sum(2)
        return {
            "codes": dense.pack_wide(codes.T, self.kind.code_bits),
            "scales": dense.pack(self.whole.T.to(torch.uint8).contiguous(), SCALE_BITS),
            "scale": self.d.T.to(HALF).contiguous(),
        }


def _cost(error: Tensor, metric: Tensor) -> Tensor:
    return (error @ metric * error).sum(1)


def _widened(metric: Tensor, size: int) -> Tensor:
    """A metric with places for columns that are not there, no two of which cost the same: nothing is left to chance."""
    missing = size - len(metric)
    if not missing:
        return metric
    wide = metric.new_zeros(size, size)
    wide[: len(metric), : len(metric)] = metric
    wide.diagonal()[len(metric) :] = PADDING * (1 + torch.arange(missing, device=metric.device) / size)
    return wide


class PointBlocks(Codec):
    """One of these types."""

    def __init__(self, kind: PointType) -> None:
        super().__init__(CodecScheme("ggml", parameters(-(-kind.code_bits // OCTET), kind.group)))
        self.kind = kind

    def describe(self) -> Described:
        return Described(f"group {self.kind.group}", self.kind.code_bits / OCTET)

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> PointEncoder:
        return PointEncoder(self.kind, weight, refit)

    def _codes(self, shape: tuple[int, int], part: Tensor) -> tuple[Tensor, Tensor]:
        """Points int64 ``(rows, octets, 8 / width)`` and signs int64 ``(rows, octets)``."""
        codes, bits = dense.unpack_wide(part, self.kind.code_bits, -(-shape[1] // OCTET)), self.kind.point_bits
        count = OCTET // self.kind.width
        points = codes[..., None] >> bits * torch.arange(count, device=codes.device) & (1 << bits) - 1
        signs = codes >> bits * count
        if self.kind.even:
            odd = (signs[..., None] >> torch.arange(OCTET, device=codes.device) & 1).sum(-1) % 2
            signs = signs | odd << OCTET - 1
        return points, signs

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        octets, groups, supers = (-(-columns // size) for size in (OCTET, self.kind.group, BLOCK))
        return {
            "codes": ((rows, dense.words_per_row(octets, self.kind.code_bits)), torch.int32),
            "scales": ((rows, dense.words_per_row(groups, SCALE_BITS)), torch.int32),
            "scale": ((rows, supers), HALF),
        }

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        if find_spec("gguf") is None:
            return f"it has the grid of {self.kind.name} from the package gguf, which is not installed"
        options = {"table": table_of(self.kind.name)}
        return KernelForm(self.kind.name.lower(), {}, options, group=self.kind.group, blocks=True)

    def fold(self, parts: Parts, factors: Tensor) -> Parts:
        return {**parts, "scale": nearest_scale(parts["scale"].float() * factors[:, None], HALF).to(HALF)}

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        groups, grid = -(-shape[1] // self.kind.group), grid_of(self.kind.name, parts["scale"].device)
        d = parts["scale"].float().repeat_interleave(BLOCK // self.kind.group, dim=1)[:, :groups]
        scale = PointFitter(self.kind, grid).scale(d, dense.unpack(parts["scales"], SCALE_BITS, groups).float())
        sizes = grid.decode(*self._codes(shape, parts["codes"])).flatten(1)[:, : shape[1]]
        return sizes * scale.repeat_interleave(self.kind.group, dim=1)[:, : shape[1]]

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        return self.decode((len(rows), shape[1]), {name: part[rows] for name, part in parts.items()})

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        if shape[1] % BLOCK:
            return f"has rows of {shape[1]} weights, which are no whole blocks of {BLOCK}"
        return GgmlForm(self.kind.name)

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        points, signs = self._codes(shape, parts["codes"])
        scales = dense.unpack(parts["scales"], SCALE_BITS, shape[1] // self.kind.group)
        supers = (shape[0], shape[1] // BLOCK, -1)
        fields = points.reshape(supers), signs.reshape(supers).to(torch.uint8), scales.reshape(supers)
        return GgmlBlocks(self.kind.pack(*fields, half_bytes(parts["scale"])))
