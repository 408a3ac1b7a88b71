"""Types with a block of 32 weights and float16 scales: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL.

Parts: ``codes``, as the codecs ``integer`` and ``nf4`` pack theirs; ``scale`` float16 ``(rows, blocks)``, of either sign but
where there are minimums; of the types _1 ``minimum`` float16 ``(rows, blocks)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quern.codecs.base import KernelForm, Parts, nearest_scale
from quern.codecs.blocks.grids import AffineGrid, BlockGrid, SignedLevels, SymmetricGrid, parameters, refuse_overflow
from quern.codecs.grouped import Grid, GroupedCodec, GroupedEncoder, Restored
from quern.codecs.integer import IntegerCodec
from quern.codecs.levels import LevelsCodec
from quern.codecs.packing import bits as dense
from quern.codecs.packing import ggml as layout
from quern.codecs.packing import planes
from quern.codecs.packing.ggml import GgmlBlocks, GgmlForm
from quern.core.scheme import CodecScheme

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of IQ4_NL and IQ4_XS by code (``kvalues_iq4nl`` of ``ggml-common.h``)."""
HALF = torch.float16


class BlockEncoder(GroupedEncoder):
    """Fits the scale of each block to its columns as they come to be rounded."""

    def _observe(self, values: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = values.new_ones(values.shape[1]) if importance is None else importance.to(values.dtype)
        assert isinstance(self.grid, BlockGrid)
        scale, zero = self.grid.fit(values, weights)
        refuse_overflow(values, scale, zero if isinstance(self.grid, AffineGrid) else scale)
        return scale, zero


class SymmetricBlocks(IntegerCodec):
    """Q4_0, Q5_0, Q8_0: the parts of symmetric integers in groups of 32, with scales of either sign."""

    def __init__(self, bits: int) -> None:
        super().__init__(CodecScheme("integer", parameters(bits, layout.BLOCK)))
        self.grid = SymmetricGrid(bits, layout.BLOCK)

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> GroupedEncoder:
        return BlockEncoder(self, weight, whole, refit)


class LevelBlocks(LevelsCodec):
    """IQ4_NL: sixteen levels times a scale of either sign."""

    levels = IQ4

    def __init__(self) -> None:
        super().__init__(CodecScheme("ggml", parameters(4, layout.BLOCK)))
        self.grid = SignedLevels(IQ4)

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> GroupedEncoder:
        return BlockEncoder(self, weight, whole, refit)

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        return layout.block_obstacle(shape[1]) or GgmlForm("IQ4_NL")

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        codes = layout.in_blocks(planes.unpack(parts["codes"], 4, shape[1]))
        return GgmlBlocks(layout.joined(layout.half_bytes(parts["scale"]), layout.nibbles(codes)))


class AffineBlocks(GroupedCodec):
    """Q4_1 and Q5_1: integers times a scale, plus a minimum."""

    def __init__(self, bits: int) -> None:
        super().__init__(CodecScheme("ggml", parameters(bits, layout.BLOCK)))
        self.grid = AffineGrid(bits, layout.BLOCK)

    def grid_of(self, whole: Tensor) -> Grid:
        return self.grid

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> GroupedEncoder:
        return BlockEncoder(self, weight, whole, refit)

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Parts:
        return {
            "codes": dense.pack(codes.contiguous(), self.params.bits),
            "scale": scale.to(HALF).contiguous(),
            "minimum": zero.to(HALF).contiguous(),
        }

    def restored(self, shape: tuple[int, int], parts: Parts) -> Restored:
        codes = dense.unpack(parts["codes"], self.params.bits, shape[1])
        return Restored(codes, parts["scale"].float(), parts["minimum"].float(), self.grid)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        groups = (rows, -(-columns // layout.BLOCK))
        words = (rows, dense.words_per_row(columns, self.params.bits))
        return {"codes": (words, torch.int32), "scale": (groups, HALF), "minimum": (groups, HALF)}

    def code_bits(self) -> dict[str, int]:
        return {"codes": self.params.bits}

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        return KernelForm(f"q{self.params.bits}_1", {}, group=layout.BLOCK, blocks=True)

    def fold(self, parts: Parts, factors: Tensor) -> Parts:
        scaled = {
            name: nearest_scale(parts[name].float() * factors[:, None], HALF).to(HALF) for name in ("scale", "minimum")
        }
        return {**parts, **scaled}

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self.decode_rows(shape, parts, torch.arange(shape[0], device=parts["scale"].device))

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        codes = dense.unpack(parts["codes"][rows], self.params.bits, shape[1]).float()
        scale, minimum = (self.spread(parts[name][rows].float(), shape[1]) for name in ("scale", "minimum"))
        return self.grid.decode(codes, scale, minimum)

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        return layout.block_obstacle(shape[1]) or GgmlForm(f"Q{self.params.bits}_1")

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        codes = dense.unpack(parts["codes"], self.params.bits, shape[1])
        return GgmlBlocks(layout.affine_blocks(codes, parts["scale"], parts["minimum"], self.params.bits))
