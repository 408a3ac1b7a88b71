"""How codes lie in the blocks of ONNX Runtime's MatMulNBits and GatherBlockQuantized (``docs/ContribOperators.md`` of
https://github.com/microsoft/onnxruntime).

A row is cut into blocks of 16 to 256 codes, of 2, 4 or 8 bits, dense, the first code lowest; a last block that the row does
not fill ends in zeros. Value = (code - zero point) x scale. Zero points lie as codes do, the blocks of a row behind each
other; where there are none, it is the middle, 2^(bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quern.codecs.packing import bits as dense

BLOCKS = (256, 128, 64, 32, 16)
"""Codes of a block, as ONNX Runtime's CPU kernels have them."""
WIDTHS = (2, 4, 8)
"""Bits of a code, likewise."""


@dataclass(frozen=True)
class NBitsForm:
    """How a matrix is cut into blocks."""

    bits: int
    """Of a stored code; codes of fewer bits take as many."""
    block: int
    """Codes of a block."""
    groups: tuple[int, ...]
    """For each block of a row, the number of the scale that it has."""


@dataclass(frozen=True)
class NBitsBlocks:
    """A matrix in such blocks."""

    codes: Tensor
    """uint8 ``(rows, blocks, bytes of a block)``."""
    scale: Tensor
    """As it is stored, ``(rows or 1, groups)``."""
    zero: Tensor | None
    """uint8 ``(rows, bytes)``; None: all zero points are the middle."""


def form_of(columns: int, group: int, bits: int) -> NBitsForm | str:
    """That of rows of ``columns`` codes, of which each ``group`` have a scale, or a clause that says why there is none."""
    whole = group >= columns
    block = next((size for size in BLOCKS if group % size == 0), BLOCKS[-1] if whole else None)
    if block is None:
        return f"it has blocks of 16 to 256 weights, of which groups of {group} are not made; use a multiple of 16"
    width = next(size for size in WIDTHS if size >= bits)
    return NBitsForm(width, block, tuple(first // group for first in range(0, columns, block)))


def in_blocks(form: NBitsForm, codes: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> NBitsBlocks:
    """A matrix of uint8 ``codes`` ``(rows, columns)`` of so many ``bits``, with scales and zero points ``(rows or 1,
    groups)``; ``zero`` None: 2^(bits - 1)."""
    rows, columns = codes.shape
    moved = codes if zero is not None else codes + ((1 << form.bits - 1) - (1 << bits - 1))
    padded = moved.new_zeros(rows, len(form.groups) * form.block)
    padded[:, :columns] = moved
    packed = _packed(padded, form.bits).view(rows, len(form.groups), -1)
    if zero is None:
        return NBitsBlocks(packed, scale, None)
    spread = zero.to(torch.uint8)[:, list(form.groups)].expand(rows, -1)
    return NBitsBlocks(packed, scale, _packed(spread, form.bits))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``(rows, count)`` as bytes ``(rows, ceil(count * bits / 8))``."""
    words = dense.pack(codes, bits)
    return words.view(torch.uint8)[:, : -(-codes.shape[1] * bits // 8)].contiguous()
