"""Codecs whose weights are codes times scales, for tensors, channels, groups or blocks: fitting the scales, and rounding.

What a code stands for is a ``Grid``'s affair; whoever shares a scale is the same for all grids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quern import _native
from quern.codecs.base import (
    Codec,
    Described,
    Encoder,
    KernelForm,
    NativeColumns,
    Parts,
    ScaledParameters,
    least_scale,
    nearest_scale,
    scales_overflow,
)
from quern.codecs.fitting.exact import Exact
from quern.codecs.trainable.base import Trainable
from quern.codecs.trainable.grids import GridTrainable
from quern.core.scheme import CodecScheme
from quern.observers.base import OBSERVERS

if TYPE_CHECKING:
    from quern.observers.base import Observer


@dataclass(frozen=True)
class GridNumbers:
    """Values that codes stand for at scale 1, as native loops take them: ``count`` even steps less a zero, or listed."""

    count: int
    limits: Tensor = field(default_factory=partial(torch.empty, 0, device="cpu"))
    """Float32 ``(count - 1,)``: between each two of the numbers; what lies on one goes to the smaller."""
    numbers: Tensor = field(default_factory=partial(torch.empty, 0, device="cpu"))
    """Float32 ``(count,)``, ascending."""
    codes: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.uint8, device="cpu"))
    """Uint8 ``(count,)``: of each of them."""


class Grid(ABC):
    """Values that one scale spans: ranges to scales, values to codes and back."""

    largest: float
    """Of the absolute values at scale 1."""

    @abstractmethod
    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (as it will be stored, float32) and zero point (integers in float32) that cover ``[low, high]``."""

    @abstractmethod
    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes (integers in float32) nearest to ``values``."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """What ``codes`` (integers in float32, which may be overwritten) stand for."""

    @abstractmethod
    def nearest_scale(self, scale: Tensor) -> Tensor:
        """The scale next to float32 ``scale`` that can be stored; never zero."""

    def span(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value at scale 1, for each of the zero points."""
        return torch.full_like(zero, -self.largest), torch.full_like(zero, self.largest)

    def numbers(self) -> GridNumbers | None:
        """What native loops need to ``encode`` and ``decode`` to the last bit; None for grids that they do not know."""
        return None

    def reconstruct(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``values`` as the grid of ``[low, high]`` gives them back."""
        scale, zero = self.parameters(low, high)
        return self.decode(self.encode(values, scale, zero), scale, zero)

    def exact(self, values: Tensor) -> Exact | None:
        """Codes, scales and zero points that stand for exactly ``values`` float32 ``(sets, width)``, of which each set has a
        scale; None if some set has none, or for grids of which nobody knows how to find them."""
        return None


@dataclass(frozen=True)
class Restored:
    """What ``GroupedCodec.store`` was given."""

    codes: Tensor
    """uint8 ``(rows, columns)``."""
    scale: Tensor
    """float32 ``(scale rows, groups)``."""
    zero: Tensor
    """Whole numbers in float32, of the same shape."""
    grid: Grid


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as ``dtype`` holds it, float32; never zero."""
    return least_scale(scale, dtype).to(dtype).to(torch.float32)


def _alike(size: int, step: int) -> list[tuple[int, int, int]]:
    """Pieces of ``step`` of so many numbers, and the rest of them: first number, how many pieces, numbers in each."""
    whole = size // step * step
    parts = [(0, size // step, step), (whole, 1, size - whole)]
    return [part for part in parts if part[1] and part[2]]


class GroupedEncoder(Encoder):
    """Rounds onto a grid; scales of groups may be fitted just before their group is rounded."""

    def __init__(self, codec: GroupedCodec, weight: Tensor, whole: Tensor, refit: bool) -> None:
        self.codec, self.grid = codec, codec.grid_of(whole)
        rows, columns = weight.shape
        self.group = codec.group_width(columns)
        groups = -(-columns // self.group)
        # Transposed, so that one column of the weight is one contiguous row.
        self.codes = weight.new_zeros(columns, rows, dtype=torch.uint8)
        self.scale = weight.new_zeros(groups, rows)
        self.zero = weight.new_zeros(groups, rows)
        if codec.params.granularity == "tensor":
            scale, zero = self._observe(whole.to(torch.float32).reshape(1, -1))
            self.scale[:], self.zero[:] = scale.item(), zero.item()
        elif refit and codec.params.group_size:
            self.refit_width = self.group
        else:
            self._fit_all(weight)
        own = codec.params.granularity in ("channel", "group")
        self.rescale_width = self.group if own else None

    def _fit_all(self, weight: Tensor) -> None:
        for first in range(0, weight.shape[1], self.group):
            self._fit(first // self.group, weight[:, first : first + self.group])

    def _fit(self, group: int, values: Tensor, importance: Tensor | None = None) -> None:
        for first, shared in self.codec.sharing(values):
            rows, height, width = shared.shape
            counts = None if importance is None else importance.repeat(height)
            scale, zero = self._observe(shared.reshape(rows, height * width), counts)
            last = first + rows * height
            self.scale[group, first:last] = scale[:, 0].repeat_interleave(height)
            self.zero[group, first:last] = zero[:, 0].repeat_interleave(height)

    def _observe(self, values: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = self.codec.observer.observe(values, self.grid.reconstruct, importance)
        scale, zero = self.grid.parameters(low, high)
        if not bool((scale * self.grid.largest).isfinite().all()):
            raise scales_overflow(values, self.codec.params.scale_dtype)
        return scale, zero

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:
        self._fit(first_column // self.group, values.T.contiguous(), importance)

    def rescale(self, first_column: int, factor: Tensor) -> Tensor:
        scale = self.scale[first_column // self.group]
        stored = self.grid.nearest_scale(scale * factor)
        stored = torch.where((stored * self.grid.largest).isfinite(), stored, scale)
        ratio = stored / scale
        scale.copy_(stored)
        return ratio

    def native_columns(self) -> NativeColumns | None:
        numbers = self.grid.numbers()
        if numbers is None or self.codes.device.type != "cpu":
            return None
        self.codes = self.codes.contiguous()  # those of ``round_all`` are not
        return _native.Columns(
            self.codes.numpy(),
            self.scale.numpy(),
            self.zero.numpy(),
            self.group,
            numbers.count,
            numbers.limits.numpy(),
            numbers.numbers.numpy(),
            numbers.codes.numpy(),
        )

    def round(self, first: int, values: Tensor) -> Tensor:
        group = first // self.group
        scale, zero = self.scale[group], self.zero[group]
        codes = self.grid.encode(values, scale, zero)
        self.codes[first] = codes[0]
        return self.grid.decode(codes, scale, zero)

    def round_all(self, weight: Tensor) -> Tensor:
        if self.refit_width:
            self._fit_all(weight)
        wide = self.codec.spread(self.scale.T, weight.shape[1]), self.codec.spread(self.zero.T, weight.shape[1])
        codes = self.grid.encode(weight, *wide)
        self.codes = codes.T.to(torch.uint8)
        return self.grid.decode(codes, *wide)

    def parts(self) -> dict[str, Tensor]:
        scale, zero = self.scale.T, self.zero.T
        step = self.codec.rows_of_scale(len(scale))
        return self.codec.store(self.codes.T, scale[::step], zero[::step], self.grid)


class GroupedCodec(Codec):
    """What such codecs share; each says what its grid is and what it stores."""

    trains_codes = True

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.params, ScaledParameters)
        self.params = scheme.params
        self.observer: Observer = OBSERVERS.get(self.params.observer)()
        if self.params.granularity == "block":
            self.slab_rows = max(self.slab_rows, self.params.group_size or 1)

    @abstractmethod
    def grid_of(self, whole: Tensor) -> Grid:
        """The grid of a matrix; that of most codecs is always the same."""

    @abstractmethod
    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The parts: codes uint8 ``(rows, columns)``; scale and zero point float32 ``(scale rows, groups)``."""

    @abstractmethod
    def restored(self, shape: tuple[int, int], parts: Parts) -> Restored:
        """The inverse of ``store``."""

    def rows_of_factor(self, rows: int) -> int:
        return self.rows_of_scale(rows)

    def fold(self, parts: Parts, factors: Tensor) -> Parts | None:
        """Scales alone change; of codecs that keep them in the part ``scale`` as they are."""
        if self.scale_dtype_name is None:
            return None
        scale = parts["scale"]
        return {**parts, "scale": nearest_scale(scale.float() * factors[:, None], scale.dtype).to(scale.dtype)}

    def trainable(self, shape: tuple[int, int], parts: Parts, weight: Tensor | None) -> Trainable:
        return super().trainable(shape, parts, None) if weight is None else GridTrainable(self, shape, parts, weight)

    def describe(self) -> Described:
        size = self.params.group_size
        return Described(f"{self.params.granularity} {size}" if size else self.params.granularity, self.params.bits)

    @property
    def scale_dtype_name(self) -> str | None:
        return self.params.scale_dtype

    @property
    def has_one_scale(self) -> bool:
        return self.params.granularity == "tensor"

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> GroupedEncoder:
        return GroupedEncoder(self, weight, whole, refit)

    def group_width(self, columns: int) -> int:
        """Inputs of a row that share a scale."""
        return min(self.params.group_size or columns, columns)

    def rows_of_scale(self, rows: int) -> int:
        """Rows of a matrix or slab of ``rows`` that share their scales."""
        if self.params.granularity == "tensor":
            return max(rows, 1)
        return self.params.group_size or 1 if self.params.granularity == "block" else 1

    def scale_rows(self, rows: int) -> int:
        """Rows of the stored scales of a matrix of ``rows``."""
        return -(-rows // self.rows_of_scale(rows))

    def sharing(self, values: Tensor) -> list[tuple[int, Tensor]]:
        """``values`` ``(rows, columns)`` of one group as ``(sets, rows of each, columns)`` with their first row."""
        if self.params.granularity != "block":
            return [(0, values[:, None])]
        size, (rows, columns) = self.rows_of_scale(len(values)), values.shape
        whole = rows // size * size
        parts = [(0, values[:whole].reshape(-1, size, columns)), (whole, values[None, whole:])]
        return [(first, part) for first, part in parts if part.numel()]

    def exact_parts(self, weight: Tensor) -> Parts | None:
        grid, (rows, columns) = self.grid_of(weight), weight.shape
        height, width = self.rows_of_scale(rows), self.group_width(columns)
        codes = weight.new_empty(rows, columns, dtype=torch.uint8)
        scale = weight.new_empty(self.scale_rows(rows), -(-columns // width))
        zero = torch.empty_like(scale)
        for (row, down, high), (column, across, wide) in product(_alike(rows, height), _alike(columns, width)):
            part = slice(row, row + down * high), slice(column, column + across * wide)
            sets = weight[part].reshape(down, high, across, wide).transpose(1, 2).reshape(down * across, high * wide)
            if (found := grid.exact(sets)) is None:
                return None
            codes[part] = found.codes.view(down, across, high, wide).transpose(1, 2).reshape(down * high, across * wide)
            at = slice(row // height, row // height + down), slice(column // width, column // width + across)
            scale[at], zero[at] = found.scale.view(down, across), found.zero.view(down, across)
        return self.store(codes, scale, zero, grid)

    def ideal_scales(self, weight: Tensor) -> Tensor | None:
        if self.scale_dtype_name is None:
            return None
        if self.params.granularity == "tensor":
            weight = weight.reshape(1, -1)
        width, (rows, columns) = self.group_width(weight.shape[1]), weight.shape
        whole = columns // width * width
        parts = [weight[:, :whole].reshape(rows, -1, width)]
        if whole < columns:
            parts.append(weight[:, None, whole:])
        low, high = (torch.cat(ends, dim=1) for ends in zip(*(part.aminmax(dim=-1) for part in parts), strict=True))
        return self.ideal_scale(low, high)

    def ideal_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale that covers ``[low, high]`` before any dtype rounds it."""
        return torch.maximum(low.abs(), high.abs()) / self.grid_of(low).largest

    def kernel_form(self, kind: str, shape: tuple[int, int], options: Mapping[str, Any], **further: Any) -> KernelForm:
        """A form of ``kind`` that reads the parts ``codes`` and ``scale`` of a matrix of ``shape``."""
        return KernelForm(
            kind,
            {"codes": "codes", "scale": "scale"},
            options,
            self.group_width(shape[1]),
            0 if self.has_one_scale else self.rows_of_scale(1),
            **further,
        )

    def join(self, slabs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = super().join(slabs)
        if self.params.granularity == "tensor":
            joined |= {name: slabs[0][name] for name in ("scale", "zero_point") if name in joined}
        return joined

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """Per-group values ``(rows, groups)`` repeated for every column: ``(rows, columns)``, or broadcastable to it."""
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.group_width(columns), dim=1)[:, :columns]

    def scales_of(self, scale: Tensor, rows: Tensor | int) -> Tensor:
        """The stored scales, or zero points, of some rows (int64 indices), or of as many as there are."""
        step = self.params.granularity
        if step == "tensor":
            return scale
        if step == "block":
            which = torch.arange(rows, device=scale.device) if isinstance(rows, int) else rows
            return scale[which // self.rows_of_scale(0)]
        return scale if isinstance(rows, int) else scale[rows]

    def scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        """``values`` float32 ``(rows, columns)`` times scales ``(rows or 1, groups)``, in place."""
        columns, width = values.shape[1], self.group_width(values.shape[1])
        whole = columns // width * width
        for start, stop, size in ((0, whole, width), (whole, columns, columns - whole)):
            if size:
                groups = slice(start // width, -(-stop // width))
                part = values[:, start:stop].view(len(values), (stop - start) // size, size)
                part.mul_(scale[:, groups, None].float())
        return values
