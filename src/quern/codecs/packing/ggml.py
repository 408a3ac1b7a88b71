"""How codes lie in ggml's blocks of 32 weights (``ggml-common.h`` of https://github.com/ggml-org/ggml).

A block is its numbers in this order: a float16 scale, of some types a float16 minimum, of 5-bit types the fifth bits of all
codes as one little-endian word, and the codes. Nibbles of a byte are codes j (low) and j + 16 (high).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quern.core.errors import UserError

BLOCK = 32
"""Weights of a block."""
HALF = BLOCK // 2
BITS = (4, 5, 8)
"""Bits of the types that are integers times a scale."""
WITH_MINIMUM = 5
"""Most bits of those of them that have a minimum."""


class Integers(Protocol):
    """What has to be known of a scheme of integers."""

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the middle."""
        ...

    @property
    def scale_dtype(self) -> str:
        """How scales are stored."""
        ...


@dataclass(frozen=True)
class GgmlForm:
    """How a matrix lies in a GGUF file."""

    kind: str
    """Name of the ggml type."""
    notes: tuple[str, ...] = ()
    """Clauses that say what is rounded or lost on the way; none where every value stays what it is."""


@dataclass(frozen=True)
class GgmlBlocks:
    """A matrix in ggml's blocks."""

    data: Tensor
    """uint8 ``(rows, bytes of a row)``."""
    rounded: int = 0
    """Scales and minimums that float16 does not hold and that were rounded to it."""
    of: int = 0
    """Scales and minimums in all."""


def block_obstacle(columns: int) -> str | None:
    """Why rows of ``columns`` weights cannot be cut into blocks, as a clause; None where they can."""
    return f"has rows of {columns} weights, which are no whole blocks of {BLOCK}" if columns % BLOCK else None


def in_blocks(codes: Tensor) -> Tensor:
    """Codes ``(rows, columns)`` as ``(rows, blocks, 32)``."""
    return codes.view(len(codes), codes.shape[1] // BLOCK, BLOCK)


def nibbles(codes: Tensor) -> Tensor:
    """uint8 codes ``(rows, blocks, 32)``, of which the lower four bits count, as bytes ``(rows, blocks, 16)``."""
    low = codes & 15
    return low[..., :HALF] | low[..., HALF:] << 4


def fifth_bits(codes: Tensor) -> Tensor:
    """The fifth bits of uint8 codes ``(rows, blocks, 32)`` as bytes ``(rows, blocks, 4)``, that of the first code lowest."""
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return ((codes >> 4 & 1).view(*codes.shape[:2], 4, 8) * weights).sum(dim=-1, dtype=torch.uint8)


def half_bytes(values: Tensor) -> Tensor:
    """Numbers ``(rows, blocks)`` as the bytes of float16 ``(rows, blocks, 2)``. Raises ``UserError`` beyond float16."""
    half = values.to(torch.float16)
    if bool((half.isinf() & values.isfinite()).any()):
        raise UserError(
            f"scales up to {float(values.abs().max()):.3g} are beyond float16, and ggml's blocks have no other. Leave the "
            "matrix unquantized, or store it in quern's own format"
        )
    return half[..., None].contiguous().view(torch.uint8)


def rounded_by_half(*numbers: Tensor) -> int:
    """How many of float32 ``numbers`` float16 does not hold."""
    return sum(int((values.to(torch.float16).float() != values).sum()) for values in numbers)


def joined(*fields: Tensor) -> Tensor:
    """Rows uint8 ``(rows, bytes)`` of the ``fields`` of blocks, each uint8 ``(rows, blocks, n)``."""
    return torch.cat(fields, dim=-1).flatten(1)


def symmetric_blocks(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Q4_0, Q5_0 or Q8_0: value = (code - 2^(bits-1)) x scale.

    ``codes`` uint8 ``(rows, columns)`` below 2^bits, ``bits`` 4, 5 or 8; ``scale`` ``(rows, blocks)``.
    """
    blocks, d = in_blocks(codes), half_bytes(scale)
    if bits == 8:
        return joined(d, blocks ^ 0x80)  # code - 128 in two's complement
    return joined(d, nibbles(blocks)) if bits == 4 else joined(d, fifth_bits(blocks), nibbles(blocks))


def affine_blocks(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """Q4_1 or Q5_1: value = code x scale + minimum. ``scale`` and ``minimum`` ``(rows, blocks)``, ``bits`` 4 or 5."""
    blocks, d, m = in_blocks(codes), half_bytes(scale), half_bytes(minimum)
    return joined(d, m, nibbles(blocks)) if bits == 4 else joined(d, m, fifth_bits(blocks), nibbles(blocks))


def integer_form(columns: int, group: int, params: Integers) -> GgmlForm | str:
    """How integers in groups of ``group`` lie in blocks, or a clause that says why they cannot."""
    if obstacle := block_obstacle(columns):
        return obstacle
    if group % BLOCK:
        return f"has scales for {group} inputs each, and ggml's blocks one for {BLOCK}"
    if not params.symmetric and params.bits > WITH_MINIMUM:
        return f"has {params.bits} bits with zero points, and ggml's blocks have zero points of 4 and 5 bits"
    notes = [] if params.scale_dtype == "float16" else [f"scales in {params.scale_dtype} become float16"]
    if not params.symmetric:
        notes.append("zero points times scales become float16 minimums")
    return GgmlForm(f"Q{_block_bits(params.bits)}_{0 if params.symmetric else 1}", tuple(notes))


def _block_bits(bits: int) -> int:
    return next(width for width in BITS if width >= bits)


def integer_blocks(codes: Tensor, scale: Tensor, zero: Tensor, params: Integers) -> GgmlBlocks:
    """Integers of ``params`` in the blocks of ``integer_form``. ``codes`` uint8 ``(rows, columns)``; ``scale`` and ``zero``
    float32 ``(rows, blocks)``."""
    bits = _block_bits(params.bits)
    if params.symmetric:
        codes = codes + ((1 << bits - 1) - (1 << params.bits - 1))
        return GgmlBlocks(symmetric_blocks(codes, scale, bits), rounded_by_half(scale), scale.numel())
    minimum = -zero * scale
    data = affine_blocks(codes, scale, minimum, bits)
    return GgmlBlocks(data, rounded_by_half(scale, minimum), 2 * scale.numel())
