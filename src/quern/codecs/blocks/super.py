"""Types with a super-block of 256 weights: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS.

The scale of 16 or 32 weights is a whole number of few bits times a float16 number of the super-block, and so is their
minimum. All of them are fitted to a super-block's columns just before the first of these is rounded, as error feedback has
left them, weighted by what errors in each column cost; the whole numbers of a sub-block once more just before its own first
column. Then they stay, and columns are rounded one by one:

1. each sub-block by itself, with scales of any size;
2. the super-block's numbers from the greatest of these, and whole numbers next to the rest;
3. the super-block's numbers by least squares for the codes that are nearest now, and every whole number one up or down where
   that loses less; twice.

Parts: ``codes`` int32, densely packed; ``scales`` and ``minimums`` int32, whole numbers of sub-blocks, packed along the row
(signed ones plus half their range); ``scale`` and ``scale_of_minimums`` float16 ``(rows, super-blocks)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from quern.codecs.base import KernelForm, Parts, nearest_scale
from quern.codecs.blocks.grids import (
    AffineGrid,
    BlockGrid,
    SignedLevels,
    SymmetricGrid,
    half,
    parameters,
    refuse_overflow,
)
from quern.codecs.blocks.plain import IQ4
from quern.codecs.grouped import Grid, GroupedCodec, GroupedEncoder, Restored
from quern.codecs.packing import bits as dense
from quern.codecs.packing import ggml_super as layout
from quern.codecs.packing.ggml import GgmlBlocks, GgmlForm, half_bytes
from quern.core.scheme import CodecScheme

HALF = torch.float16
ROUNDS = 2
"""How often the numbers of a super-block are fitted to its codes."""


@dataclass(frozen=True)
class SuperType:
    """What one of these types is."""

    name: str
    bits: int
    group: int
    """Weights of a sub-block."""
    scale_bits: int
    """Of a whole number of a scale or minimum."""
    grid: Callable[[], BlockGrid]
    pack: Callable[..., Tensor]

    @property
    def bias(self) -> int:
        """What is added to whole numbers of scales that have a sign; 0 where they have none."""
        return 0 if isinstance(self.grid(), AffineGrid) else 1 << self.scale_bits - 1


TYPES = {
    one.name: one
    for one in (
        SuperType("Q2_K", 2, 16, 4, lambda: AffineGrid(2, 16, below_zero=True), layout.q2_k),
        SuperType("Q3_K", 3, 16, 6, lambda: SymmetricGrid(3, 16), layout.q3_k),
        SuperType("Q4_K", 4, 32, 6, lambda: AffineGrid(4, 32, below_zero=True), layout.q4_k),
        SuperType("Q5_K", 5, 32, 6, lambda: AffineGrid(5, 32, below_zero=True), layout.q5_k),
        SuperType("Q6_K", 6, 16, 8, lambda: SymmetricGrid(6, 16), layout.q6_k),
        SuperType("IQ4_XS", 4, 32, 6, lambda: SignedLevels(IQ4), layout.iq4_xs),
    )
}


@dataclass
class _Numbers:
    """What stands for the scales of one super-block of some rows."""

    whole: Tensor
    """Of the scales, float32 ``(rows, sub-blocks)``, never 0."""
    d: Tensor
    """float32 ``(rows, 1)``."""
    lows: Tensor
    """Of the minimums, which are below zero, ``(rows, sub-blocks)``; zeros where there are none."""
    d_min: Tensor

    @property
    def scale(self) -> Tensor:
        """``(rows, sub-blocks)``, as it is decoded."""
        return self.d * self.whole

    @property
    def minimum(self) -> Tensor:
        """The same of the minimums."""
        return -(self.d_min * self.lows)


class SuperEncoder(GroupedEncoder):
    """Fits the numbers of each super-block to its columns, and rounds onto the grids of its sub-blocks."""

    def __init__(self, codec: SuperBlocks, weight: Tensor, whole: Tensor, refit: bool) -> None:
        rows, columns = weight.shape
        supers, groups = -(-columns // layout.BLOCK), -(-columns // codec.group_width(columns))
        self.type = codec.type
        self.whole = weight.new_ones(groups, rows)
        self.lows = weight.new_zeros(groups, rows)
        self.d, self.d_min = weight.new_zeros(supers, rows), weight.new_zeros(supers, rows)
        super().__init__(codec, weight, whole, refit)
        self.rescale_width, self.step_width = None, self.group
        if self.refit_width is not None:
            self.refit_width, self.refine_width = layout.BLOCK, self.group

    def _fit_all(self, weight: Tensor) -> None:
        for first in range(0, weight.shape[1], layout.BLOCK):
            values = weight[:, first : first + layout.BLOCK]
            self._fit_super(first, values, values.new_ones(values.shape[1]))

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:
        self._fit_super(first_column, values.T, importance.to(values.dtype))

    def _fit_super(self, first: int, values: Tensor, importance: Tensor) -> None:
        assert isinstance(self.grid, BlockGrid)
        missing = -values.shape[1] % self.group
        weights = pad(importance, (0, missing)).view(-1, self.group)
        parts = pad(values, (0, missing)).contiguous().view(len(values), -1, self.group)
        found = _fitted(self.grid, self.type, parts, weights)
        refuse_overflow(values, found.d, found.d_min)
        groups = slice(first // self.group, first // self.group + parts.shape[1])
        self.whole[groups], self.lows[groups] = found.whole.T, found.lows.T
        self.d[first // layout.BLOCK], self.d_min[first // layout.BLOCK] = found.d[:, 0], found.d_min[:, 0]
        self.scale[groups] = found.scale.T
        if isinstance(self.grid, AffineGrid):
            self.zero[groups] = found.minimum.T
        elif isinstance(self.grid, SymmetricGrid):
            self.zero[groups] = float(self.grid.middle)

    def refine(self, first_column: int, values: Tensor, importance: Tensor) -> None:
        """The whole numbers of one sub-block, for the super-block's numbers as they are."""
        assert isinstance(self.grid, BlockGrid)
        group, place = first_column // self.group, first_column // layout.BLOCK
        block, weights = values.T.contiguous()[:, None], importance.to(values.dtype)[None]
        d, d_min = self.d[place][:, None], self.d_min[place][:, None]
        scale, zero = self.grid.fit(block[:, 0], weights[0], stored=False)
        most = (1 << self.type.scale_bits) - 1 - self.type.bias
        low = -self.type.bias or 1
        lows = torch.zeros_like(d) if self.type.bias else (-zero / d_min).round_().clamp_(0, most)
        fresh = _Numbers(_whole(scale / d, low, most), d, lows, d_min)
        former = _Numbers(self.whole[group][:, None], d, self.lows[group][:, None], d_min)
        _step(self.grid, self.type, fresh, block, weights)
        losses = [_losses(self.grid, each.scale, each.minimum, block, weights) for each in (fresh, former)]
        better = losses[0] < losses[1]
        found = _Numbers(
            torch.where(better, fresh.whole, former.whole), d, torch.where(better, fresh.lows, former.lows), d_min
        )
        self.whole[group], self.lows[group] = found.whole[:, 0], found.lows[:, 0]
        self.scale[group] = found.scale[:, 0]
        if isinstance(self.grid, AffineGrid):
            self.zero[group] = found.minimum[:, 0]

    def _near(self, first_column: int) -> list[_Numbers]:
        """Those of a sub-block with the whole number of the scale, the minimum or both one up or down, ``(rows, 1)``."""
        group, place = first_column // self.group, first_column // layout.BLOCK
        found = _Numbers(
            *(part[:, None] for part in (self.whole[group], self.d[place], self.lows[group], self.d_min[place]))
        )
        return [_Numbers(whole, found.d, lows, found.d_min) for whole, lows in _beside(self.type, found)][1:]

    def neighbours(self, first_column: int) -> Tensor:
        assert isinstance(self.grid, BlockGrid)
        codes = self.codes[first_column : first_column + self.group].float()
        near = self._near(first_column)
        scales = torch.stack([one.scale.T for one in near])
        zeros = torch.stack([_zero(self.grid, one.minimum)[..., 0].T for one in near])
        return self.grid.decode(codes.expand(len(near), *codes.shape).clone(), scales, zeros)

    def adopt(self, first_column: int, choice: Tensor) -> None:
        group, moves = first_column // self.group, choice >= 0
        near, chosen = self._near(first_column), choice.clamp(min=0)[None]
        for values, of in ((self.whole, "whole"), (self.lows, "lows"), (self.scale, "scale"), (self.zero, "minimum")):
            if values is self.zero and self.type.bias:
                continue
            wanted = torch.cat([getattr(one, of) for one in near], 1).T.gather(0, chosen)[0]
            values[group] = torch.where(moves, wanted, values[group])

    def parts(self) -> Parts:
        bits, bias = self.type.scale_bits, self.type.bias
        parts = {
            "codes": dense.pack(self.codes.T.contiguous(), self.type.bits),
            "scales": dense.pack((self.whole.T + bias).to(torch.uint8).contiguous(), bits),
            "scale": self.d.T.to(HALF).contiguous(),
        }
        if not bias:
            parts["minimums"] = dense.pack(self.lows.T.to(torch.uint8).contiguous(), bits)
            parts["scale_of_minimums"] = self.d_min.T.to(HALF).contiguous()
        return parts


def _fitted(grid: BlockGrid, kind: SuperType, values: Tensor, importance: Tensor) -> _Numbers:
    """The numbers of a super-block: ``values`` ``(rows, sub-blocks, width)``, ``importance`` ``(sub-blocks, width)``."""
    each = [grid.fit(values[:, place], importance[place], stored=False) for place in range(values.shape[1])]
    scale, zero = (torch.cat([one[part] for one in each], dim=1) for part in (0, 1))
    most = (1 << kind.scale_bits) - 1
    if kind.bias:
        greatest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        d = half(greatest / -kind.bias)
        found = _Numbers(_whole(scale / d, -kind.bias, kind.bias - 1), d, torch.zeros_like(scale), torch.zeros_like(d))
    else:
        d, d_min = (half(part.amax(1, keepdim=True) / most) for part in (scale, -zero))
        found = _Numbers(_whole(scale / d, 1, most), d, (-zero / d_min).round_().clamp_(0, most), d_min)
    for _ in range(ROUNDS):
        _refit_super(grid, found, values, importance)
        _step(grid, kind, found, values, importance)
    return found


def _whole(ratio: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers next to ``ratio``, of its sign and never 0."""
    rounded = ratio.round().clamp_(low, high)
    return torch.where(rounded == 0, torch.where(ratio < 0, -1.0, 1.0).clamp_(low, high), rounded)


def _rounded(grid: BlockGrid, scale: Tensor, minimum: Tensor, values: Tensor) -> Tensor:
    """``values`` as these scales and minimums ``(rows, sub-blocks)`` give them back."""
    zero = _zero(grid, minimum)
    return grid.decode(grid.encode(values, scale[..., None], zero), scale[..., None], zero)


def _zero(grid: BlockGrid, minimum: Tensor) -> Tensor:
    if isinstance(grid, SymmetricGrid):
        return torch.full_like(minimum[..., None], float(grid.middle))
    return minimum[..., None]


def _losses(grid: BlockGrid, scale: Tensor, minimum: Tensor, values: Tensor, importance: Tensor) -> Tensor:
    """What each sub-block loses, ``(rows, sub-blocks)``."""
    return ((_rounded(grid, scale, minimum, values) - values).square_() * importance).sum(-1)


def _refit_super(grid: BlockGrid, found: _Numbers, values: Tensor, importance: Tensor) -> None:
    """The super-block's numbers by least squares for the codes that are nearest now, where that loses less."""
    zero = _zero(grid, found.minimum)
    codes = grid.encode(values, found.scale[..., None], zero)
    if isinstance(grid, AffineGrid):
        step = codes * found.whole[..., None]
    else:
        step = grid.decode(codes, torch.ones_like(found.scale)[..., None], zero) * found.whole[..., None]
    low = -found.lows[..., None].expand_as(step)

    def total(first: Tensor, second: Tensor) -> Tensor:
        return (first * second * importance).sum((1, 2))[:, None]

    square, mixed, lows = total(step, step), total(step, low), total(low, low)
    value, beneath = total(step, values), total(low, values)
    determinant = square * lows - mixed.square()
    d, d_min = (value * lows - beneath * mixed) / determinant, (beneath * square - value * mixed) / determinant
    both = d.isfinite() & d_min.isfinite() & (d_min > 0) & (d * found.d > 0)
    alone = (value - found.d_min * mixed) / square
    alone = torch.where(alone.isfinite() & (alone * found.d > 0), alone, found.d)
    d = half(torch.where(both, d, alone))
    d_min = torch.where(both, half(d_min), found.d_min)
    other = _Numbers(found.whole, d, found.lows, d_min)
    before = _losses(grid, found.scale, found.minimum, values, importance).sum(1, keepdim=True)
    after = _losses(grid, other.scale, other.minimum, values, importance).sum(1, keepdim=True)
    found.d, found.d_min = torch.where(after < before, d, found.d), torch.where(after < before, d_min, found.d_min)


def _step(grid: BlockGrid, kind: SuperType, found: _Numbers, values: Tensor, importance: Tensor) -> None:
    """Every whole number one up or down, of scale and minimum alike, where its sub-block loses less."""
    best, whole, lows = torch.full_like(found.whole, torch.inf), found.whole, found.lows
    for wanted, low in _beside(kind, found):
        loss = _losses(grid, found.d * wanted, -(found.d_min * low), values, importance)
        better = loss < best
        best, whole = torch.where(better, loss, best), torch.where(better, wanted, whole)
        lows = torch.where(better, low, lows)
    found.whole, found.lows = whole, lows


def _beside(kind: SuperType, found: _Numbers) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole numbers of scales and minimums as they are, and then each one up or down, as far as they can be stored."""
    most = (1 << kind.scale_bits) - 1 - kind.bias
    for up, down in product((0, 1, -1), (0,) if kind.bias else (0, 1, -1)):
        wanted = (found.whole + up).clamp(-kind.bias, most)
        wanted = torch.where(wanted == 0, found.whole, wanted)
        yield wanted, (found.lows + down).clamp(0, most) if not kind.bias else found.lows


class SuperBlocks(GroupedCodec):
    """One of these types."""

    def __init__(self, kind: SuperType) -> None:
        super().__init__(CodecScheme("ggml", parameters(kind.bits, kind.group)))
        self.type, self.grid = kind, kind.grid()

    def grid_of(self, whole: Tensor) -> Grid:
        return self.grid

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> SuperEncoder:
        return SuperEncoder(self, weight, whole, refit)

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Parts:
        raise NotImplementedError("scales of sub-blocks are not stored one by one")

    def exact_parts(self, weight: Tensor) -> None:
        return None

    def restored(self, shape: tuple[int, int], parts: Parts) -> Restored:
        codes = dense.unpack(parts["codes"], self.type.bits, shape[1])
        return Restored(codes, *self._scales(shape, parts), self.grid)

    def _whole(self, shape: tuple[int, int], part: Tensor) -> Tensor:
        """Whole numbers of the sub-blocks, uint8 ``(rows, sub-blocks)``."""
        return dense.unpack(part, self.type.scale_bits, self._groups(shape))

    def _groups(self, shape: tuple[int, int]) -> int:
        return -(-shape[1] // self.group_width(shape[1]))

    def _scales(self, shape: tuple[int, int], parts: Parts) -> tuple[Tensor, Tensor]:
        """Scales and zero points float32 ``(rows, sub-blocks)``."""
        repeats, groups = layout.BLOCK // self.type.group, self._groups(shape)

        def wide(d: Tensor) -> Tensor:
            return d.float().repeat_interleave(repeats, dim=1)[:, :groups]

        scale = wide(parts["scale"]) * (self._whole(shape, parts["scales"]).float() - self.type.bias)
        if "minimums" in parts:
            return scale, -(wide(parts["scale_of_minimums"]) * self._whole(shape, parts["minimums"]).float())
        return scale, torch.full_like(scale, float(getattr(self.grid, "middle", 0)))

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        whole = (rows, dense.words_per_row(self._groups(shape), self.type.scale_bits))
        supers = (rows, -(-columns // layout.BLOCK))
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows, dense.words_per_row(columns, self.type.bits)), torch.int32),
            "scales": (whole, torch.int32),
            "scale": (supers, HALF),
        }
        if not self.type.bias:
            shapes |= {"minimums": (whole, torch.int32), "scale_of_minimums": (supers, HALF)}
        return shapes

    def code_bits(self) -> dict[str, int]:
        return {"codes": self.type.bits}

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        return KernelForm(self.type.name.lower(), {}, group=self.type.group, blocks=True)

    def fold(self, parts: Parts, factors: Tensor) -> Parts:
        names: list[str] = [name for name in ("scale", "scale_of_minimums") if name in parts]
        folded = {name: nearest_scale(parts[name].float() * factors[:, None], HALF).to(HALF) for name in names}
        return {**parts, **folded}

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        stored = self.restored(shape, parts)
        wide = self.spread(stored.scale, shape[1]), self.spread(stored.zero, shape[1])
        return stored.grid.decode(stored.codes.float(), *wide)

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        return self.decode((len(rows), shape[1]), {name: part[rows] for name, part in parts.items()})

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        if shape[1] % layout.BLOCK:
            return f"has rows of {shape[1]} weights, which are no whole blocks of {layout.BLOCK}"
        return GgmlForm(self.type.name)

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        supers = shape[1] // layout.BLOCK
        codes = dense.unpack(parts["codes"], self.type.bits, shape[1]).view(shape[0], supers, layout.BLOCK)
        names = ["scales", "minimums"] if "minimums" in parts else ["scales"]
        whole = [self._whole(shape, parts[name]).view(shape[0], supers, -1) for name in names]
        halves = [half_bytes(parts[name]) for name in ("scale", "scale_of_minimums") if name in parts]
        return GgmlBlocks(self.type.pack(codes, *whole, *halves))
