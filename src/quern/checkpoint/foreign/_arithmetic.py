"""What the methods share: codes out of words and bytes, and codes times scales, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

VALUES_AT_ONCE = 1 << 20
"""Numbers that are decoded at a time, which bounds what is made on the way."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of FP4 (E2M1) by code: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5)."""
E8M0_NAN = 255
"""The byte that is no number where scales are powers of two."""
_MANTISSA_BITS = 23


def slabs(count: int, width: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``count`` rows of ``width`` numbers; all but the last are a multiple of ``multiple`` long."""
    step = max(1, VALUES_AT_ONCE // max(width, 1) // multiple) * multiple
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


def words_for(count: int, bits: int) -> int:
    """How many 32-bit words hold ``count`` codes, one behind the other."""
    return -(-count * bits // 32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes that lie one behind the other in 32-bit words, lowest bits first, across the borders of words too.

    ``words``: int32 ``(words_for(count, bits), columns)``, each column a stream of its own. Returns uint8
    ``(count, columns)``. Code i takes the bits ``i * bits`` to ``(i + 1) * bits - 1`` of its stream.
    """
    common = math.gcd(bits, 32)
    period, codes = bits // common, 32 // common  # so many words hold so many codes, and then it begins anew
    columns = words.shape[1]
    if left := -words.shape[0] % period:
        words = torch.cat([words, words.new_zeros(left, columns)])
    streams = words.view(-1, period, columns)
    result = torch.empty(streams.shape[0], codes, columns, dtype=torch.uint8)
    for code in range(codes):
        word, shift = divmod(code * bits, 32)
        here = min(bits, 32 - shift)
        value = (streams[:, word] >> shift) & ((1 << here) - 1)
        if here < bits:
            value = value | ((streams[:, word + 1] & ((1 << (bits - here)) - 1)) << here)
        result[:, code] = value
    return result.view(-1, columns)[:count]


def unpack_nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """Two codes of 4 bits out of each byte: uint8 ``(..., n)`` becomes uint8 ``(..., 2 n)``."""
    pair = (packed & 15, packed >> 4)
    return torch.stack(pair[::-1] if high_first else pair, dim=-1).flatten(-2)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Float32 2 ** (byte - 127) for uint8 (E8M0) other than 255: the byte is the exponent of a float32 as it is stored."""
    bits = exponents.int() << _MANTISSA_BITS
    return torch.where(exponents == 0, 1 << (_MANTISSA_BITS - 1), bits).view(torch.float32)  # 2 ** -127 is subnormal


def fill_scaled(
    target: Tensor,
    codes: Callable[[int, int], Tensor],
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    divisor: Tensor | None = None,
    multiple: int = 1,
) -> None:
    """Set ``target`` to (code - zero) * scale / divisor, some rows at a time.

    ``target``: float ``(r, c)``, perhaps the transpose of a weight. ``codes(begin, end)``: integers or float32 ``(end
    - begin, c)``. ``scale`` float32 and ``zero`` int32 have the same shape; row i and column j of the target use the
    entry ``[rows[i], columns[j]]`` (None: the entry of their own number). ``multiple``: of what ranges of rows are.
    The product is float32 and rounded once: exact where the scale has 16 bits or less and the code eight.
    """

    def spread(table: Tensor, begin: int, end: int) -> Tensor:
        chosen = table[begin:end] if rows is None else table[rows[begin:end]]
        return chosen if columns is None else chosen[:, columns]

    for begin, end in slabs(target.shape[0], target.shape[1], multiple):
        values = codes(begin, end)
        if zero is not None:
            values = values.int() - spread(zero, begin, end)
        product = values.float() * spread(scale, begin, end)
        target[begin:end] = product if divisor is None else product / divisor
