"""How kernels want codes with tables: two and four bits densely packed, three bits as planes (csrc/kernels/weight.h).

A row of 3-bit codes has the lower two bits of all, four codes a byte; after them, of every 256 columns, four planes of third
bits, those of columns 0, 4, 8 ... first, a bit each. Planes of the last, fewer columns are as many whole bytes as they need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quern.codecs.packing import bits as dense

PLANE_COLUMNS = 256
THREE = 3


def words_per_row(columns: int, bits: int) -> int:
    """32-bit words of a row of ``columns`` codes."""
    if bits != THREE:
        return dense.words_per_row(columns, bits)
    return dense.words_per_row(columns, 2) + 8 * (columns // PLANE_COLUMNS) + -(-(columns % PLANE_COLUMNS) // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``(rows, columns)`` below 2^bits as int32 ``(rows, words_per_row)``; unused bits are zero."""
    if bits != THREE:
        return dense.pack(codes, bits)
    low = dense.pack(codes & 3, 2)
    parts = [_octets(low)]
    for first, stop, width in _blocks(codes.shape[1]):
        parts += [_bytes(codes[:, first:stop][:, plane::4] >> 2, width) for plane in range(4)]
    joined = torch.cat(parts, dim=1)
    return joined.reshape(-1).view(torch.int32).view(len(joined), joined.shape[1] // 4)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of ``pack``: uint8 ``(rows, columns)``."""
    if bits != THREE:
        return dense.unpack(words, bits, columns)
    low_words = dense.words_per_row(columns, 2)
    codes = dense.unpack(words[:, :low_words], 2, columns).clone()
    high = words[:, low_words:]
    octets = _octets(high)
    at = 0
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    for first, stop, width in _blocks(columns):
        for plane in range(4):
            spread = (octets[:, at : at + width, None] >> shifts & 1).flatten(1)
            block = codes[:, first + plane : stop : 4]
            block += spread[:, : block.shape[1]] << 2
            at += width
    return codes


def _octets(words: Tensor) -> Tensor:
    """The bytes of int32 ``(rows, n)``: uint8 ``(rows, 4 n)``."""
    # A dimension of 1 may have any stride, which view() to another dtype would not take.
    flat = words.contiguous().as_strided((words.numel(),), (1,))
    return flat.view(torch.uint8).view(len(words), 4 * words.shape[1])


def _blocks(columns: int) -> list[tuple[int, int, int]]:
    """First and last column of each set of planes, and the bytes of one of them."""
    starts = range(0, columns, PLANE_COLUMNS)
    ends = [min(start + PLANE_COLUMNS, columns) for start in starts]
    return [(start, stop, -(-(stop - start) // 32)) for start, stop in zip(starts, ends, strict=True)]


def _bytes(bits: Tensor, width: int) -> Tensor:
    """uint8 ``(rows, width)`` of bits ``(rows, n)``, least significant first."""
    padded = bits.new_zeros(len(bits), 8 * width)
    padded[:, : bits.shape[1]] = bits
    weights = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
    return (padded.view(len(bits), width, 8) * weights).sum(dim=2, dtype=torch.uint8)
