"""8-bit floating-point numbers times a scale (Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433).

``e4m3`` has four bits of exponent and reaches 448, ``e5m2`` five and 57344. Parts: ``codes`` float8_e4m3fn or float8_e5m2
``(rows, columns)``; ``scale`` ``scale_dtype`` ``(rows, groups)``, ``(rows, 1)`` per channel, ``(1, 1)`` per tensor,
``(blocks, groups)`` per block.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from quern.codecs.base import CODECS, KernelForm, Parts, ScaledParameters, nearest_scale
from quern.codecs.fitting.exact import Exact, exact_floats
from quern.codecs.grouped import Grid, GroupedCodec, Restored, stored_scale
from quern.codecs.packing.floats import FloatForm
from quern.core.scheme import CodecScheme

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Float8Parameters(ScaledParameters):
    """Eight bits and a symmetric range."""

    bits: Literal[8] = 8
    symmetric: Literal[True] = True
    granularity: Literal["tensor", "channel", "group", "block"] = "channel"
    group_size: Annotated[int, Field(ge=1)] | None = None
    variant: Literal["e4m3", "e5m2"] = "e4m3"
    """Four bits of exponent and three of fraction, or five and two."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float32"


class Float8Grid(Grid):
    """The numbers of one variant; a code is a byte."""

    def __init__(self, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
        self.dtype, self.scale_dtype = dtype, scale_dtype
        self.largest = torch.finfo(dtype).max

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = stored_scale(torch.maximum(low.abs(), high.abs()) / self.largest, self.scale_dtype)
        return scale, torch.zeros_like(scale)

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes nearest to ``values``; half-way it is the even one."""
        numbers = (values / scale).clamp_(-self.largest, self.largest).to(self.dtype)
        return numbers.view(torch.uint8).float()

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return codes.to(torch.uint8).view(self.dtype).float().mul_(scale)

    def nearest_scale(self, scale: Tensor) -> Tensor:
        return nearest_scale(scale, self.scale_dtype)

    def exact(self, values: Tensor) -> Exact | None:
        return exact_floats(values, self.dtype, self.scale_dtype)


@CODECS.add("float8")
class Float8Codec(GroupedCodec):
    """8-bit floating-point numbers times scales."""

    Parameters = Float8Parameters
    technique = "floating point"
    takes_values = True

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.params, Float8Parameters)
        self.variant = scheme.params.variant
        self.grid = Float8Grid(DTYPES[self.variant], getattr(torch, self.params.scale_dtype))

    def grid_of(self, whole: Tensor) -> Float8Grid:
        return self.grid

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Parts:
        return {
            "codes": codes.contiguous().view(self.grid.dtype),
            "scale": scale.to(self.grid.scale_dtype).contiguous(),
        }

    def restored(self, shape: tuple[int, int], parts: Parts) -> Restored:
        scale = parts["scale"].float()
        return Restored(parts["codes"].view(torch.uint8), scale, torch.zeros_like(scale), self.grid)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups = -(-shape[1] // self.group_width(shape[1]))
        return {
            "codes": (shape, self.grid.dtype),
            "scale": ((self.scale_rows(shape[0]), groups), self.grid.scale_dtype),
        }

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        return self.kernel_form(
            f"float8_{self.variant}", shape, {"scale_type": self.params.scale_dtype}, exact_inputs=True
        )

    def floats(self) -> FloatForm | str:
        if self.variant != "e4m3":
            return "its 8-bit floating-point codes are e4m3; set variant: e4m3"
        if self.params.granularity == "group":
            return "8-bit floating-point codes have no groups in it; use granularity channel, tensor or block"
        size = self.params.group_size
        block = None if size is None else (size, size)
        return FloatForm("float-quantized", 8, self.params.granularity, block=block)

    def float_tensors(self, shape: tuple[int, int], parts: Parts) -> dict[str, Tensor]:
        scale = parts["scale"].reshape(1) if self.params.granularity == "tensor" else parts["scale"]
        return {"weight": parts["codes"], "weight_scale": scale}

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self.scaled(parts["codes"].float(), self.scales_of(parts["scale"], shape[0]))

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        codes = parts["codes"].view(torch.uint8)[rows].view(self.grid.dtype)
        return self.scaled(codes.float(), self.scales_of(parts["scale"], rows))
