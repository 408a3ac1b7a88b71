"""What codes of ggml's block types stand for at a scale, and the scales that lose least.

A scale may be negative: grids reach further on one side than on the other, and the sign says on which. Scales are fitted by
weighted least squares. Codes that are nearest at some scale give the scale at which they lose least,

    s = sum w v l / sum w l^2            with v the values, l the levels of their codes, w what errors cost,

at which other codes may be nearest; from several first scales this is done twice each, and the best end is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quern.codecs.base import TINY, ScaledParameters, nearest_scale, scales_overflow
from quern.codecs.grouped import Grid
from quern.codecs.integer import IntegerGrid
from quern.codecs.levels import ScaledLevels

STEPS = 2
"""How often codes and scale follow each other."""
SHRINK = (1.0, 0.93, 0.86, 0.78, 0.7)
"""First ranges of an affine grid, as fractions of the whole one."""
HALF = torch.float16
LARGEST = 2.0**48
"""Of weights: what squared errors of 256 of them can be summed of in float32, and more than any scales reach."""


def parameters(bits: int, group_size: int) -> ScaledParameters:
    """What a type of so many bits would be as integers in groups."""
    return ScaledParameters(bits=bits, group_size=group_size)


def half(values: Tensor) -> Tensor:
    """The float16 numbers next to ``values``, float32; never zero, so that one can divide by them."""
    stored = nearest_scale(values, HALF)
    return torch.where(stored == 0, TINY, stored)


def weighted_error(values: Tensor, rounded: Tensor, importance: Tensor) -> Tensor:
    """What each set loses, ``(..., 1)``."""
    return ((values - rounded).square_() * importance).sum(-1, keepdim=True)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, TINY, scale)


def fit_signed(
    grid: Grid, starts: Sequence[float], zero: Tensor, values: Tensor, importance: Tensor, stored: bool
) -> Tensor:
    """Scales ``(sets, 1)`` of ``values`` ``(sets, width)`` on a grid without minimum.

    ``starts``: levels at which the greatest value is tried first; ``zero`` ``(sets, 1)``: the grid's zero points;
    ``importance`` ``(width,)``; ``stored``: whether scales have to be float16 numbers.
    """
    one = torch.ones_like(zero)
    greatest = values.gather(1, values.abs().argmax(1, keepdim=True))
    best, best_error = half(greatest / starts[0]), torch.full_like(zero, torch.inf)
    for start in starts:
        scale = _nonzero(greatest / start)
        for _ in range(STEPS):
            level = grid.decode(grid.encode(values, scale, zero), one, zero)
            size = (level.square() * importance).sum(1, keepdim=True)
            product = (values * level * importance).sum(1, keepdim=True)
            scale = torch.where(size > 0, _nonzero(product / size), scale)
        scale = half(scale) if stored else scale
        error = weighted_error(values, grid.decode(grid.encode(values, scale, zero), scale, zero), importance)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


class SymmetricGrid(IntegerGrid):
    """Integers from -2^(bits-1) to 2^(bits-1) - 1 times a scale of either sign."""

    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__(parameters(bits, group_size))
        shrinks = (1.0,) if bits >= 8 else (0.87, 0.94, 1.0, 1.08, 1.2)
        self.starts = tuple(end * shrink for end in (-self.middle, self.middle - 1) for shrink in shrinks)

    def fit(self, values: Tensor, importance: Tensor, stored: bool = True) -> tuple[Tensor, Tensor]:
        """Scale and zero point ``(sets, 1)``; see ``fit_signed``."""
        zero = torch.full_like(values[:, :1], float(self.middle))
        return fit_signed(self, self.starts, zero, values, importance, stored), zero


class SignedLevels(ScaledLevels):
    """Whole numbers of a table times a scale of either sign."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__(levels, HALF)
        self.starts = tuple(end * shrink for end in (min(levels), max(levels)) for shrink in (0.9, 1.0, 1.12, 1.25))

    def fit(self, values: Tensor, importance: Tensor, stored: bool = True) -> tuple[Tensor, Tensor]:
        """Scale and zero point ``(sets, 1)``; see ``fit_signed``."""
        zero = torch.zeros_like(values[:, :1])
        return fit_signed(self, self.starts, zero, values, importance, stored), zero


class AffineGrid(IntegerGrid):
    """Integers from 0 to 2^bits - 1 times a scale, plus a minimum: what stands for the zero point is that number itself."""

    def __init__(self, bits: int, group_size: int, below_zero: bool = False) -> None:
        """``below_zero``: whether minimums are at most 0."""
        super().__init__(parameters(bits, group_size))
        self.below_zero = below_zero

    def numbers(self) -> None:
        """A minimum is no whole number of steps, which native loops take a zero point for."""
        return None

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return ((values - zero) / scale).round_().clamp_(0, self.levels)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return codes.mul_(scale).add_(zero)

    def fit(self, values: Tensor, importance: Tensor, stored: bool = True) -> tuple[Tensor, Tensor]:
        """Scale, above 0, and minimum ``(sets, 1)`` of ``values`` ``(sets, width)``; see ``fit_signed``."""
        low, high = values.aminmax(dim=1, keepdim=True)
        if self.below_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        best, best_minimum, best_error = torch.ones_like(low), low, torch.full_like(low, torch.inf)
        for shrink in SHRINK:
            scale = _nonzero((high - low) * (shrink / self.levels))
            minimum = low + (high - low) * ((1 - shrink) / 2)
            if self.below_zero:
                minimum = minimum.clamp(max=0)
            for _ in range(STEPS):
                scale, minimum = self._least(values, self.encode(values, scale, minimum), importance, scale, minimum)
            if stored:
                scale, minimum = half(scale).abs(), nearest_scale(minimum, HALF)
            error = weighted_error(values, self.decode(self.encode(values, scale, minimum), scale, minimum), importance)
            better = error < best_error
            best, best_minimum = torch.where(better, scale, best), torch.where(better, minimum, best_minimum)
            best_error = torch.where(better, error, best_error)
        return best, best_minimum

    def _least(
        self, values: Tensor, codes: Tensor, importance: Tensor, scale: Tensor, minimum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scale and minimum at which ``codes`` lose least; those that came where no scale is above 0."""
        weight = importance.sum()
        first, second = (codes * importance).sum(1, keepdim=True), (codes.square() * importance).sum(1, keepdim=True)
        value = (values * importance).sum(1, keepdim=True)
        product = (values * codes * importance).sum(1, keepdim=True)
        found = (weight * product - first * value) / (weight * second - first.square())
        offset = (value - found * first) / weight
        if self.below_zero:
            alone = product / second
            found, offset = torch.where(offset > 0, alone, found), offset.clamp(max=0)
        usable = found.isfinite() & offset.isfinite() & (found > 0)
        return torch.where(usable, found, scale), torch.where(usable, offset, minimum)


BlockGrid = SymmetricGrid | SignedLevels | AffineGrid
"""What fits its scales itself."""


def refuse_overflow(values: Tensor, *numbers: Tensor) -> None:
    """Raise ``UserError`` where numbers that fitted ``values`` are beyond float16, or squares of these beyond float32."""
    largest = torch.finfo(HALF).max
    if not all(bool((each.abs() < largest).all()) for each in numbers) or bool(values.abs().amax() > LARGEST):
        raise scales_overflow(values, "float16")
