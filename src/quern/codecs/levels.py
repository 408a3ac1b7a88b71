"""Codecs of a few fixed values times a scale: what power-of-two, NF4 and 4-bit floating-point codes share.

Values are whole numbers that fit a byte, so that one instruction looks them up and another multiplies them with int8
inputs. Parts: ``codes``, packed as ``planes`` says, and ``scale``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quern.codecs.base import KernelForm, Parts, nearest_scale
from quern.codecs.grouped import Grid, GridNumbers, GroupedCodec, Restored, stored_scale
from quern.codecs.packing import planes
from quern.core.scheme import CodecScheme


class LevelGrid(Grid):
    """Whole numbers, one for each code, times a scale."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        """``levels`` by code; a number that two codes stand for is written as the first of them."""
        # The device is said because the first to ask may be building modules on the meta device.
        self.values = torch.tensor(levels, dtype=torch.float32, device="cpu")
        ordered = sorted({level: code for code, level in reversed(list(enumerate(levels)))}.items())
        self.codes = torch.tensor([code for _, code in ordered], dtype=torch.float32, device="cpu")
        sizes = torch.tensor([level for level, _ in ordered], dtype=torch.float32, device="cpu")
        self.limits = (sizes[1:] + sizes[:-1]) / 2
        self.largest = float(self.values.abs().max())

    def scale_of(self, greatest: Tensor) -> Tensor:
        """The stored scale, float32, at which the largest value is about ``greatest``."""
        raise NotImplementedError

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale_of(torch.maximum(low.abs(), high.abs()))
        return scale, torch.zeros_like(scale)

    def span(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(zero, float(self.values.min())), torch.full_like(zero, float(self.values.max()))

    def numbers(self) -> GridNumbers:
        codes = self.codes.to(torch.uint8)
        return GridNumbers(len(codes), self.limits, self.values[codes.long()], codes)

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes nearest to ``values``; half-way it is the smaller value's."""
        device = values.device
        rank = torch.bucketize((values / scale).contiguous(), self.limits.to(device))
        return self.codes.to(device)[rank]

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return self.values.to(codes.device)[codes.long()].mul_(scale)


class ScaledLevels(LevelGrid):
    """Scales are plain numbers of some dtype."""

    def __init__(self, levels: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(levels)
        self.dtype = dtype

    def scale_of(self, greatest: Tensor) -> Tensor:
        return stored_scale(greatest / self.largest, self.dtype)

    def nearest_scale(self, scale: Tensor) -> Tensor:
        return nearest_scale(scale, self.dtype)


class LevelsCodec(GroupedCodec):
    """What these codecs share: packing, decoding, kernels."""

    levels: tuple[int, ...]
    """By code."""
    unit: ClassVar[float] = 1.0
    """What the integer 1 among the levels stands for at scale 1."""

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        self.grid: LevelGrid = ScaledLevels(self.levels, getattr(torch, self.params.scale_dtype))

    def grid_of(self, whole: Tensor) -> LevelGrid:
        return self.grid

    def store_scale(self, scale: Tensor) -> Parts:
        """The parts that hold ``scale`` float32 ``(scale rows, groups)``."""
        return {"scale": scale.to(self.scale_part()).contiguous()}

    def scale_part(self) -> torch.dtype:
        """Dtype of the part ``scale``."""
        dtype: torch.dtype = getattr(torch, self.params.scale_dtype)
        return dtype

    @property
    def scale_type(self) -> str:
        """What kernels call it."""
        return str(self.scale_part()).removeprefix("torch.")

    def read_scale(self, parts: Parts) -> Tensor:
        """The scales that the parts mean, float32 ``(scale rows, groups)``."""
        return parts["scale"].float()

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Parts:
        return {"codes": planes.pack(codes.contiguous(), self.params.bits), **self.store_scale(scale)}

    def restored(self, shape: tuple[int, int], parts: Parts) -> Restored:
        codes, scale = planes.unpack(parts["codes"], self.params.bits, shape[1]), self.read_scale(parts) * self.unit
        return Restored(codes, scale, torch.zeros_like(scale), self.stored_grid(parts))

    def stored_grid(self, parts: Parts) -> LevelGrid:
        """The grid of a matrix that is stored as ``parts``."""
        return self.grid

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        groups = -(-columns // self.group_width(columns))
        return {
            "codes": ((rows, planes.words_per_row(columns, self.params.bits)), torch.int32),
            "scale": ((self.scale_rows(rows), groups), self.scale_part()),
        }

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        table = torch.tensor(self.levels, dtype=torch.int8).numpy()
        options = {"scale_type": self.scale_type, "table": table, "scale_factor": self.unit}
        return self.kernel_form(f"codebook{self.params.bits}", shape, options)

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self._decode(parts["codes"], parts, shape[0], shape[1])

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        return self._decode(parts["codes"][rows], parts, rows, shape[1])

    def _decode(self, codes: Tensor, parts: Parts, rows: Tensor | int, columns: int) -> Tensor:
        numbers = self.grid.values.to(codes.device)[planes.unpack(codes, self.params.bits, columns).long()]
        return self.scaled(numbers, self.scales_of(self.read_scale(parts), rows) * self.unit)
