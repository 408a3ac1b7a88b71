"""Uniform integers of 1 to 8 bits: value = (code - zero point) x scale (Jacob et al. 2018, arXiv 1712.05877, eq. 1).

Codes are unsigned. A symmetric grid has the fixed zero point 2^(bits-1); an asymmetric one stores an integer zero point
beside every scale. Parts:

- ``codes``: int8 ``(rows, columns)``, code - 128, for symmetric 8 bits; otherwise int32, bit-packed along the row.
- ``scale``: ``scale_dtype`` ``(rows, groups)``; ``(rows, 1)`` per channel, ``(1, 1)`` per tensor, ``(blocks, groups)`` per
  block.
- ``zero_point`` (asymmetric only): int32, bit-packed down the rows, ``(words_per_row(rows), groups)``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from quern.codecs.base import CODECS, KernelForm, Parts, ScaledParameters, nearest_scale
from quern.codecs.fitting.exact import Exact, exact_codes
from quern.codecs.grouped import Grid, GridNumbers, GroupedCodec, Restored, stored_scale
from quern.codecs.packing import bits, nbits
from quern.codecs.packing import ggml as layout
from quern.codecs.packing.ggml import GgmlBlocks, GgmlForm
from quern.codecs.packing.nbits import NBitsBlocks, NBitsForm
from quern.core.scheme import CodecScheme
from quern.core.stacking import NO_TRAITS, Traits

NIBBLE = 4
"""Bits of codes whose kernel subtracts zero points itself."""
TABLED = 2
"""Bits of symmetric codes that a kernel looks up in a table of the integers."""
USUAL_GROUPS = (1024, 512, 256, 128, 96, 64, 48, 32, 16)
"""Sizes of groups that tools use."""
SCALE_DTYPES = ("float16", "bfloat16", "float32")
FINE = 8
"""Weights of so many bits get inputs as two int8 numbers each. Rounding the inputs to one would cost about ten times what
rounding the weights did; the second one is nearly free where memory limits, because the weights are read once."""


class IntegerParameters(ScaledParameters):
    """Symmetric codes of any width are int8 numbers."""

    def int8_obstacle(self) -> str | None:
        if self.granularity == "block":
            return "asks for granularity: block"
        return None if self.symmetric else "asks for symmetric: False"

    def input_group_obstacle(self, size: int) -> str | None:
        if self.group_size in (None, size):
            return None
        return f"asks for groups of {self.group_size}; take the same size, or granularity channel or tensor"


class IntegerGrid(Grid):
    """The integer grid of one scheme."""

    def __init__(self, params: ScaledParameters) -> None:
        self.bits = params.bits
        self.levels = (1 << params.bits) - 1
        self.largest = self.levels
        self.middle = 1 << (params.bits - 1)
        self.symmetric = params.symmetric
        self.scale_dtype = getattr(torch, params.scale_dtype)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that cover ``[low, high]`` and 0."""
        scale = stored_scale(self.ideal_scale(low, high), self.scale_dtype)
        if self.symmetric:
            return scale, torch.full_like(scale, self.middle)
        return scale, (-low.clamp(max=0) / scale).round_().clamp_(0, self.levels)

    def ideal_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale before any dtype rounds it."""
        if self.symmetric:
            return torch.maximum(low.abs(), high.abs()) * (2 / self.levels)
        return (high.clamp(min=0) - low.clamp(max=0)) / self.levels

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes nearest to ``values``; ties go to the even code."""
        return (values / scale).round_().add_(zero).clamp_(0, self.levels)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return codes.sub_(zero).mul_(scale)

    def nearest_scale(self, scale: Tensor) -> Tensor:
        return nearest_scale(scale, self.scale_dtype)

    def span(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        return -zero, self.levels - zero

    def numbers(self) -> GridNumbers | None:
        return GridNumbers(self.levels + 1)

    def exact(self, values: Tensor) -> Exact | None:
        return exact_codes(values, self.bits, self.symmetric, self.scale_dtype)


@CODECS.add("integer")
class IntegerCodec(GroupedCodec):
    """Uniform integers; see the module's page for what is stored."""

    Parameters = IntegerParameters
    technique = "uniform"
    takes_values = True

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        self.grid = IntegerGrid(self.params)

    @property
    def traits(self) -> Traits:
        if self.params.bits >= FINE:
            return NO_TRAITS
        return Traits(wants={"even columns": "all columns under one scale are rounded in equal steps"})

    @property
    def _bytes(self) -> bool:
        return self.params.bits == 8 and self.params.symmetric

    def grid_of(self, whole: Tensor) -> IntegerGrid:
        return self.grid

    def ideal_scale(self, low: Tensor, high: Tensor) -> Tensor:
        return self.grid.ideal_scale(low, high)

    def exact_scheme(self, weight: Tensor) -> CodecScheme | None:
        sizes = [None, *(size for size in USUAL_GROUPS if size < weight.shape[1])]
        for size, width, symmetric, dtype in product(sizes, range(1, 9), (True, False), SCALE_DTYPES):
            granularity = "channel" if size is None else "group"
            scheme = self.scheme.with_params(
                bits=width, symmetric=symmetric, granularity=granularity, group_size=size, scale_dtype=dtype
            )
            if IntegerCodec(scheme).exact_parts(weight) is not None:
                return scheme
        return None

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Parts:
        parts = {"codes": self.pack_codes(codes), "scale": scale.to(self.grid.scale_dtype).contiguous()}
        if not self.params.symmetric:
            packed = bits.pack(zero.T.to(torch.uint8), self.params.bits)
            parts["zero_point"] = packed.T.contiguous()
        return parts

    def pack_codes(self, codes: Tensor) -> Tensor:
        """The stored form of uint8 codes ``(rows, columns)``."""
        return (codes.to(torch.int16) - 128).to(torch.int8) if self._bytes else bits.pack(codes, self.params.bits)

    def restored(self, shape: tuple[int, int], parts: Parts) -> Restored:
        codes, scale, zero = parts["codes"], parts["scale"].float(), self._zero(parts)
        unpacked = (codes.to(torch.int16) + 128).to(torch.uint8) if self._bytes else None
        return Restored(
            bits.unpack(codes, self.params.bits, shape[1]) if unpacked is None else unpacked,
            scale,
            torch.full_like(scale, self.grid.middle) if zero is None else zero.float(),
            self.grid,
        )

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        width = self.params.bits
        groups, scale_rows = -(-columns // self.group_width(columns)), self.scale_rows(rows)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows, columns), torch.int8)
            if self._bytes
            else ((rows, bits.words_per_row(columns, width)), torch.int32),
            "scale": ((scale_rows, groups), self.grid.scale_dtype),
        }
        if not self.params.symmetric:
            shapes["zero_point"] = ((bits.words_per_row(scale_rows, width), groups), torch.int32)
        return shapes

    def code_bits(self) -> dict[str, int]:
        return {"codes": self.params.bits}

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        params = self.params
        if params.bits == 8 and not params.symmetric:
            return "it has no kernel for asymmetric 8-bit weights"
        options: dict[str, Any] = {"scale_type": params.scale_dtype}
        if params.bits == NIBBLE:
            form = self.kernel_form("integer4", shape, options)
            return form if params.symmetric else replace(form, arrays={**form.arrays, "zeros": "zero_point"})
        if params.bits == TABLED and params.symmetric:
            options["table"] = (torch.arange(1 << params.bits) - self.grid.middle).to(torch.int8).numpy()
            return self.kernel_form(f"codebook{params.bits}", shape, options)
        return self.kernel_form("integer8", shape, options, decoded=not self._bytes, fine=params.bits >= FINE)

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        return layout.integer_form(shape[1], self.group_width(shape[1]), self.params)

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        stored, repeats = self.restored(shape, parts), self.group_width(shape[1]) // layout.BLOCK

        def by_block(values: Tensor) -> Tensor:
            wide = self.scales_of(values, shape[0]).expand(shape[0], -1)
            return wide.repeat_interleave(repeats, dim=1)[:, : shape[1] // layout.BLOCK]

        scale, zero = by_block(stored.scale), by_block(stored.zero)
        return layout.integer_blocks(stored.codes, scale, zero, self.params)

    def nbits(self, shape: tuple[int, int]) -> NBitsForm | str:
        return nbits.form_of(shape[1], self.group_width(shape[1]), self.params.bits)

    def nbits_blocks(self, shape: tuple[int, int], parts: Parts) -> NBitsBlocks:
        form, stored = self.nbits(shape), self.restored(shape, parts)
        assert not isinstance(form, str), form
        scale, zero = self.scales_of(parts["scale"], shape[0]), self.scales_of(stored.zero, shape[0])
        return nbits.in_blocks(form, stored.codes, self.params.bits, scale, None if self.params.symmetric else zero)

    def _differences(self, codes: Tensor, zero: Tensor | None, columns: int) -> Tensor:
        """code - zero point, float32 ``(rows, columns)``, of the stored ``codes`` of some rows."""
        # Signed bytes are codes minus the middle already.
        values = codes.float() if self._bytes else bits.unpack(codes, self.params.bits, columns).float()
        if self._bytes:
            return values
        return values.sub_(self.grid.middle if zero is None else self.spread(zero.float(), columns))

    def int8_codes(self, shape: tuple[int, int], parts: Parts) -> tuple[Tensor, Tensor, int]:
        assert self.params.symmetric
        codes = parts["codes"]
        if not self._bytes:
            unpacked = bits.unpack(codes, self.params.bits, shape[1])
            codes = (unpacked.to(torch.int16) - self.grid.middle).to(torch.int8)
        return codes, parts["scale"].float(), self.group_width(shape[1])

    def _zero(self, parts: Parts) -> Tensor | None:
        """Zero points uint8 ``(scale rows, groups)`` of an asymmetric grid."""
        if self.params.symmetric:
            return None
        return bits.unpack(parts["zero_point"].T, self.params.bits, parts["scale"].shape[0]).T

    def integers(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        """code - zero point: it fits a byte up to seven bits."""
        return self._differences(parts["codes"], self._zero(parts), shape[1]).to(torch.int8)

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self._decode(shape, parts["codes"], parts, shape[0])

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        return self._decode(shape, parts["codes"][rows], parts, rows)

    def _decode(self, shape: tuple[int, int], codes: Tensor, parts: Parts, rows: Tensor | int) -> Tensor:
        zero = self._zero(parts)
        zero = None if zero is None else self.scales_of(zero, rows)
        return self.scaled(self._differences(codes, zero, shape[1]), self.scales_of(parts["scale"], rows))
