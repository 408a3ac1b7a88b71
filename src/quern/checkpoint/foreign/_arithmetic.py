"""What the methods share: codes out of words and bytes, and codes times scales, some rows at a time.

All of it is numpy on views of tensors: torch would share each small operation among threads, which wait for each other for
longer than they compute where the processors are busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

VALUES_AT_ONCE = 1 << 18
"""Numbers that are decoded at a time, which bounds what is made on the way, and keeps it in the caches."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
"""Values of FP4 (E2M1) by code: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5)."""
FP8 = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float().numpy()
"""Values of FP8 (E4M3) by code."""
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


def unpack_words(words: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """Codes that lie one behind the other in 32-bit words, lowest bits first, across the borders of words too.

    ``words``: int32 ``(words_for(count, bits), columns)``, each column a stream of its own. Returns ``(count, columns)``.
    Code i takes the bits ``i * bits`` to ``(i + 1) * bits - 1`` of its stream.
    """
    common = math.gcd(bits, 32)
    period, codes = bits // common, 32 // common  # so many words hold so many codes, and then it begins anew
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    if left := -len(words) % period:
        unsigned = np.concatenate([unsigned, np.zeros((left, words.shape[1]), np.uint32)])
    streams = unsigned.reshape(-1, period, words.shape[1])
    result = np.empty((len(streams), codes, words.shape[1]), np.uint8)
    for code in range(codes):
        word, shift = divmod(code * bits, 32)
        here = min(bits, 32 - shift)
        value = streams[:, word] >> np.uint32(shift)
        if here < bits:
            value = value | streams[:, word + 1] << np.uint32(here)
        result[:, code] = value & np.uint32((1 << bits) - 1)
    return result.reshape(-1, words.shape[1])[:count]


def unpack_nibbles(packed: NDArray[np.uint8], *, high_first: bool = False) -> NDArray[np.uint8]:
    """Two codes of 4 bits out of each byte: ``(..., n)`` becomes ``(..., 2 n)``."""
    pair = (packed & 15, packed >> 4)
    both = np.stack(pair[::-1] if high_first else pair, axis=-1)
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def powers_of_two(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """2 ** (byte - 127) for bytes (E8M0) other than 255: the byte is the exponent of a float32 as it is stored."""
    bits = exponents.astype(np.uint32) << np.uint32(_MANTISSA_BITS)
    return np.where(exponents == 0, np.uint32(1 << (_MANTISSA_BITS - 1)), bits).view(np.float32)  # 2 ** -127: subnormal


def fill_scaled(
    target: Tensor,
    codes: Callable[[int, int], Array],
    scale: Array,
    *,
    zero: Array | None = None,
    rows: Array | None = None,
    columns: Array | None = None,
    divisor: float | None = None,
    multiple: int = 1,
) -> None:
    """Set ``target`` to (code - zero) * scale / divisor, some rows at a time.

    ``target``: float32 ``(r, c)``, perhaps the transpose of a weight. ``codes(begin, end)``: integers or float32
    ``(end - begin, c)``. ``scale`` float32 and ``zero`` int32 have the same shape; row i and column j of the target use
    the entry ``[rows[i], columns[j]]`` (None: the entry of their own number, or the only one). ``multiple``: of what
    ranges of rows are. The product is float32 and rounded once: exact where the scale has 16 bits or less and the code
    eight. What overflows is infinite; whoever uses the weights checks for that.
    """
    result = target.numpy()

    def spread(table: Array, begin: int, end: int) -> Array:
        chosen = table[begin:end] if rows is None else table[rows[begin:end]]
        return chosen if columns is None else chosen[:, columns]

    with np.errstate(all="ignore"):
        for begin, end in slabs(target.shape[0], target.shape[1], multiple):
            values = codes(begin, end)
            if zero is not None:
                values = values.astype(np.int32) - spread(zero, begin, end)
            product = values.astype(np.float32) * spread(scale, begin, end)
            result[begin:end] = product if divisor is None else product / np.float32(divisor)
