"""How codes lie in ggml's blocks of 32 weights (``ggml-common.h`` of https://github.com/ggml-org/ggml).

A block is its numbers in this order: a float16 scale, of some types a float16 minimum, of 5-bit types the fifth bits of all
codes as one little-endian word, and the codes. Nibbles of a byte are codes j (low) and j + 16 (high).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quern.core.errors import UserError

BLOCK = 32
"""Weights of a block."""
HALF = BLOCK // 2


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
