"""Dense bit packing: code i of a row occupies bits [i*b, (i+1)*b) of the row, least significant first, in 32-bit words.

Codes straddle word boundaries, rows start on one. For 4 and 8 bits this is also what compressed-tensors writes; for the
other widths since its version 0.17.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
from torch import Tensor

WORD = 32
PACKED_ROWS = 64
"""Rows whose codes are widened to 64 bits at a time."""


def words_per_row(columns: int, bits: int) -> int:
    """32-bit words of a row of ``columns`` codes."""
    return -(-columns * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``(rows, columns)`` below 2^bits as int32 ``(rows, words_per_row)``; unused bits are zero."""
    if 8 % bits == 0:  # no code straddles a byte, and little-endian bytes are little-endian words
        rows, columns = codes.shape
        per_byte = 8 // bits
        padded = codes.new_zeros(rows, words_per_row(columns, bits) * 4 * per_byte)
        padded[:, :columns] = codes
        octets = padded[:, ::per_byte].clone()
        for index in range(1, per_byte):
            octets |= padded[:, index::per_byte] << (index * bits)
        return octets.reshape(-1).view(torch.int32).view(rows, -1)
    return torch.cat([pack_any(part, bits) for part in torch.split(codes, PACKED_ROWS)])


def pack_any(codes: Tensor, bits: int) -> Tensor:
    """``pack`` without short cuts: right for every width, and the judge of the short cuts."""
    rows, columns = codes.shape
    per_period = WORD // gcd(bits, WORD)  # codes until a code starts on a word boundary again
    words_per_period = bits // gcd(bits, WORD)
    periods = -(-columns // per_period)
    padded = torch.zeros(rows, periods * per_period, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    padded = padded.view(rows, periods, per_period)
    words = torch.zeros(rows, periods, words_per_period, dtype=torch.int64, device=codes.device)
    for index in range(per_period):
        word, shift = divmod(index * bits, WORD)
        words[:, :, word] |= padded[:, :, index] << shift
        if shift + bits > WORD:
            words[:, :, word + 1] |= padded[:, :, index] >> (WORD - shift)
    words = words.view(rows, -1)[:, : words_per_row(columns, bits)] & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """``pack`` of int64 codes ``(rows, columns)`` of up to 32 bits: each as so many of one bit."""
    shifts = torch.arange(bits, device=codes.device)
    parts = [(part[..., None] >> shifts & 1).to(torch.uint8).flatten(1) for part in torch.split(codes, PACKED_ROWS)]
    return torch.cat([pack(part, 1) for part in parts])


@cache
def _byte_shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of ``pack``: uint8 ``(rows, columns)``."""
    if 8 % bits == 0:  # little-endian words are little-endian bytes, and no code straddles a byte
        # A dimension of 1 may have any stride, which view() to another dtype would not take.
        flat = words.contiguous().as_strided((words.numel(),), (1,))
        octets = flat.view(torch.uint8).view(words.shape[0], words.shape[1] * 4)
        if bits == 8:
            return octets[:, :columns]
        spread = (octets.unsqueeze(-1) >> _byte_shifts(bits).to(octets.device)).bitwise_and_((1 << bits) - 1)
        return spread.flatten(1)[:, :columns]
    return unpack_any(words, bits, columns)


def unpack_any(words: Tensor, bits: int, columns: int) -> Tensor:
    """``unpack`` without short cuts: right for every width, and the judge of the short cuts."""
    rows = words.shape[0]
    per_period = WORD // gcd(bits, WORD)
    words_per_period = bits // gcd(bits, WORD)
    periods = -(-columns // per_period)
    wide = torch.zeros(rows, periods * words_per_period, dtype=torch.int64, device=words.device)
    wide[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    wide = wide.view(rows, periods, words_per_period)
    codes = torch.empty(rows, periods, per_period, dtype=torch.uint8, device=words.device)
    for index in range(per_period):
        word, shift = divmod(index * bits, WORD)
        value = wide[:, :, word] >> shift
        if shift + bits > WORD:
            value = value | (wide[:, :, word + 1] << (WORD - shift))
        codes[:, :, index] = value & ((1 << bits) - 1)
    return codes.flatten(1)[:, :columns]


def unpack_wide(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of ``pack_wide``: int64 ``(rows, columns)``."""
    shifts = torch.arange(bits, device=words.device)
    parts = [
        unpack(part, 1, columns * bits).reshape(len(part), columns, bits) for part in torch.split(words, PACKED_ROWS)
    ]
    return torch.cat([(part.long() << shifts).sum(-1) for part in parts])
