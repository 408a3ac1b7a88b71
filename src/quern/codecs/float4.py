"""4-bit floating-point numbers (E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives) in blocks that share a scale.

- ``mxfp4``: blocks of 32 with a power of two each (OCP Microscaling Formats (MX) Specification 1.0, 2023).
- ``nvfp4``: blocks of 16 with a number of E4M3 each, and one float32 scale for the tensor (NVIDIA's NVFP4, 2025).

Parts: ``codes`` int32 ``(rows, words)``, in whose bytes two codes lie, low nibble first, as both specifications have them;
``scale`` ``(rows, blocks)``, uint8 exponents plus 127 or float8_e4m3fn; of ``nvfp4`` ``tensor_scale`` float32 ``(1,)``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quern.codecs.base import CODECS, TINY, KernelForm, Parts, ScaledParameters
from quern.codecs.fitting.exact import Exact
from quern.codecs.levels import LevelGrid, LevelsCodec
from quern.codecs.packing import ggml as layout
from quern.codecs.packing import planes
from quern.codecs.packing.floats import FloatForm, nibble_bytes
from quern.codecs.packing.ggml import GgmlBlocks, GgmlForm
from quern.core.errors import UserError
from quern.core.scheme import CodecScheme
from quern.core.stacking import Traits

HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
"""The numbers by code, in halves; codes from 8 on are their negatives."""
E2M1 = (*HALVES, *(-half for half in HALVES))
LARGEST = 6.0
BIAS, MOST_EXPONENT = 127, 127
E4M3_LARGEST, E4M3_LEAST = 448.0, 2.0**-9


class Float4Parameters(ScaledParameters):
    """Four bits and a symmetric range, in blocks along the rows whose size and scales the format fixes."""

    bits: Literal[4] = 4
    symmetric: Literal[True] = True
    granularity: Literal["group"] = "group"


class Mxfp4Parameters(Float4Parameters):
    """Blocks of 32."""

    group_size: Literal[32] = 32


class Nvfp4Parameters(Float4Parameters):
    """Blocks of 16."""

    group_size: Literal[16] = 16


class PowerGrid(LevelGrid):
    """Scales are powers of two, rounded up so that nothing is clipped; narrower ranges of an observer try smaller ones."""

    def scale_of(self, greatest: Tensor) -> Tensor:
        if not bool(greatest.isfinite().all()):
            raise UserError("the matrix has weights that are not finite numbers. Check the checkpoint")
        fraction, exponent = torch.frexp(greatest / LARGEST)  # fraction in [.5, 1)
        exponent = exponent - (fraction <= 0.5).int()
        return torch.ldexp(torch.ones_like(fraction), exponent.clamp(-BIAS, MOST_EXPONENT)) / 2

    def nearest_scale(self, scale: Tensor) -> Tensor:
        """Next by its logarithm."""
        exponent = torch.log2(scale * 2).round().int()  # of numbers, where scales are those of halves
        return torch.ldexp(torch.ones_like(scale), exponent.clamp(-BIAS, MOST_EXPONENT)) / 2

    def exact(self, values: Tensor) -> Exact | None:
        """By the least scale that clips nothing: twice a number that is below the half of the largest is another one."""
        scale, zero = self.parameters(*values.aminmax(dim=1, keepdim=True))
        codes = self.encode(values, scale, zero)
        if not torch.equal(self.decode(codes, scale, zero), values):
            return None
        return Exact(codes.to(torch.uint8), scale[:, 0], zero[:, 0])


class Float8Grid(LevelGrid):
    """Scales that are E4M3 numbers times one scale of the tensor."""

    def __init__(self, tensor_scale: Tensor) -> None:
        super().__init__(E2M1)
        self.tensor_scale = tensor_scale

    def scale_of(self, greatest: Tensor) -> Tensor:
        wanted = (greatest / LARGEST / self.tensor_scale).clamp(E4M3_LEAST, E4M3_LARGEST)
        return wanted.to(torch.float8_e4m3fn).float() * self.tensor_scale / 2

    def nearest_scale(self, scale: Tensor) -> Tensor:
        return self.scale_of(scale * 2 * LARGEST)


class Float4Codec(LevelsCodec):
    """What the two share. A grid's scales are those of halves, since its levels are."""

    technique = "block floating point"
    levels = E2M1
    unit = 0.5

    @property
    def scale_dtype_name(self) -> None:
        return None

    def ideal_scales(self, weight: Tensor) -> None:
        return None


@CODECS.add("mxfp4")
class Mxfp4Codec(Float4Codec):
    """Blocks of 32 with a power of two each."""

    Parameters = Mxfp4Parameters
    takes_values = True

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        self.grid = PowerGrid(E2M1)

    @property
    def traits(self) -> Traits:
        return Traits(wants={"even columns": "32 columns have one scale, which is only near to their greatest"})

    def store_scale(self, scale: Tensor) -> Parts:
        _, exponent = torch.frexp(scale.contiguous() * 2)
        return {"scale": (exponent - 1 + BIAS).to(torch.uint8)}

    def scale_part(self) -> torch.dtype:
        return torch.uint8

    def read_scale(self, parts: Parts) -> Tensor:
        exponents = parts["scale"].int()
        scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - BIAS)
        return torch.where(exponents == 255, torch.nan, scale)

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        return layout.block_obstacle(shape[1]) or GgmlForm("MXFP4")

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        codes = layout.in_blocks(planes.unpack(parts["codes"], self.params.bits, shape[1]))
        return GgmlBlocks(layout.joined(parts["scale"][:, :, None], layout.nibbles(codes)))

    def floats(self) -> FloatForm | str:
        return FloatForm("mxfp4-pack-quantized", 4, "group", self.params.group_size, scale_dtype="torch.uint8")

    def float_tensors(self, shape: tuple[int, int], parts: Parts) -> dict[str, Tensor]:
        return {"weight_packed": nibble_bytes(parts["codes"], shape[1]), "weight_scale": parts["scale"]}

    @property
    def scale_type(self) -> str:
        return "float8_e8m0fnu"


@CODECS.add("nvfp4")
class Nvfp4Codec(Float4Codec):
    """Blocks of 16 with an E4M3 number each, and a scale for all."""

    Parameters = Nvfp4Parameters

    def grid_of(self, whole: Tensor) -> LevelGrid:
        largest = whole.abs().amax().float()
        if not bool(largest.isfinite()):
            raise UserError("the matrix has weights that are not finite numbers. Check the checkpoint")
        scale = largest / (LARGEST * E4M3_LARGEST)
        return Float8Grid(torch.where(scale < torch.finfo(torch.float32).tiny, TINY, scale))

    def stored_grid(self, parts: Parts) -> LevelGrid:
        return Float8Grid(parts["tensor_scale"].float()[0])

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: object) -> Parts:
        assert isinstance(grid, Float8Grid)
        parts = super().store(codes, scale / grid.tensor_scale * 2, zero, grid)
        return {**parts, "tensor_scale": grid.tensor_scale.reshape(1).clone()}

    def scale_part(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def read_scale(self, parts: Parts) -> Tensor:
        return parts["scale"].float() * parts["tensor_scale"].float()

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {**super().part_shapes(shape), "tensor_scale": ((1,), torch.float32)}

    def join(self, slabs: list[Parts]) -> Parts:
        return super().join(slabs) | {"tensor_scale": slabs[0]["tensor_scale"]}

    def floats(self) -> FloatForm | str:
        return FloatForm(
            "nvfp4-pack-quantized", 4, "tensor_group", self.params.group_size, scale_dtype="torch.float8_e4m3fn",
            joined_scale=True,
        )  # fmt: skip

    def float_tensors(self, shape: tuple[int, int], parts: Parts) -> dict[str, Tensor]:
        return {
            "weight_packed": nibble_bytes(parts["codes"], shape[1]),
            "weight_scale": parts["scale"],
            "weight_global_scale": parts["tensor_scale"].reciprocal(),  # theirs divides
        }

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        options = {"scale_type": self.scale_type, "table": torch.tensor(E2M1, dtype=torch.int8).numpy()}
        return self.kernel_form("codebook4", shape, options, factor=("tensor_scale", self.unit))
