"""The symbols of a tensor that are worth coding, and back (docs/format.md, "Coded tensors")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.safetensors_file import DTYPES

CHUNK = 1 << 20
"""Symbols of a chunk: of each plane; the last chunk has fewer."""
GROUP = 8
"""Symbols that together fill whole bytes, whatever their width."""
PLANES = {"F16": 2, "BF16": 2, "F32": 4}
"""Planes of dtypes that have several."""
CODED = (*PLANES, "U8", "I8", "I32", "F8_E5M2", "F8_E4M3")
"""Dtypes that are coded."""
_KEYS = ("dtype", "shape", "planes", "width", "checksum")

Octets = NDArray[np.uint8]


@dataclass(frozen=True)
class Coding:
    """How a coded tensor lies in its bytes."""

    dtype: str
    """Of the tensor, as a safetensors header names it."""
    shape: tuple[int, ...]
    planes: int
    """Symbols of one number: the bytes of a floating-point number, else 1."""
    width: int
    """Bits of a symbol; 8 with several planes."""
    checksum: int
    """CRC-32 of the checksums of all frames, which ties them to this tensor and to their order."""

    @property
    def size(self) -> int:
        """Bytes of the tensor in memory."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the tensor that a whole chunk decodes to."""
        return CHUNK * self.planes * self.width // 8

    def symbols(self, size: int) -> int:
        """Symbols in a plane of ``size`` bytes of the tensor."""
        return -(-8 * size // (self.planes * self.width))

    def to_json(self) -> dict[str, Any]:
        """What ``parse_coding`` reads back."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "planes": self.planes,
            "width": self.width,
            "checksum": self.checksum,
        }


def parse_coding(values: object) -> Coding:
    """A coding from plain data. Raises ``ValueError`` for what none can be."""
    if not isinstance(values, dict) or set(values) != set(_KEYS):
        raise ValueError(f"it is not described by exactly {', '.join(_KEYS)}")
    dtype, shape, planes, width, checksum = (values[key] for key in _KEYS)
    if not isinstance(dtype, str) or dtype not in CODED:
        raise ValueError(f"it has dtype {str(dtype)[:40]!r}; coded are {', '.join(CODED)}")
    counts = isinstance(shape, list) and all(type(count) is int and 0 < count < 1 << 48 for count in shape)
    if not counts or math.prod(shape) >= 1 << 48:
        raise ValueError("its shape is not a list of positive integers, or counts more elements than 48 bits do")
    wanted = PLANES.get(dtype, 1)
    if type(planes) is not int or planes != wanted:
        raise ValueError(f"it has {str(planes)[:40]} planes; a tensor of dtype {dtype} has {wanted}")
    if type(width) is not int or not (width == 8 or (planes == 1 and 5 <= width <= 7)):
        raise ValueError(f"it has symbols of {str(width)[:40]} bits; there are 5 to 8, and 8 with several planes")
    if type(checksum) is not int or not 0 <= checksum < 1 << 32:
        raise ValueError("its checksum is not an integer of 32 bits")
    return Coding(dtype, tuple(shape), planes, width, checksum)


def split(raw: Octets, coding: Coding) -> list[Octets]:
    """The symbols of each plane, one a byte, of ``raw`` bytes of a tensor; its last symbol may be filled up with zeros."""
    if coding.planes > 1:
        return list(_rotated(raw, coding.planes, 1).reshape(-1, coding.planes).T[::-1].copy())
    if coding.width == 8:
        return [raw]
    width, count = coding.width, coding.symbols(raw.size)
    groups = np.zeros((-(-raw.size // width), GROUP), np.uint8)
    whole = raw.size // width
    groups[:whole, :width] = raw[: whole * width].reshape(-1, width)
    groups[whole:, : raw.size % width] = raw[whole * width :]
    words = groups.view("<u8")[:, 0]
    symbols = np.empty_like(groups)
    for place in range(GROUP):
        symbols[:, place] = words >> np.uint64(width * place) & np.uint64((1 << width) - 1)
    return [symbols.reshape(-1)[:count]]


def merge(symbols: list[Octets], coding: Coding, out: Octets) -> None:
    """The inverse of ``split``: fills ``out``. Raises ``ValueError`` for symbols that have more bits than their width."""
    if coding.planes > 1:
        octets = np.empty((len(symbols[0]), coding.planes), np.uint8)
        for place, plane in enumerate(reversed(symbols)):
            octets[:, place] = plane
        out[:] = _rotated(octets.reshape(-1), coding.planes, 8 * coding.planes - 1)
        return
    (only,) = symbols
    if coding.width == 8:
        out[:] = only
        return
    width = np.uint64(coding.width)
    if only.max(initial=0) >> coding.width:
        raise ValueError(f"holds symbols of more than {coding.width} bits")
    groups = np.zeros(-(-only.size // GROUP), "<u8")
    groups.view(np.uint8)[: only.size] = only
    # Neighbours move together: pairs of bytes, then of 16 and of 32 bits, each holding twice the bits of the step before.
    for lane, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        low, high = groups & np.uint64(mask), groups >> np.uint64(lane) & np.uint64(mask)
        groups = low | high << width * np.uint64(lane // 8)
    merged = groups.view(np.uint8).reshape(-1, GROUP)[:, : coding.width]
    whole = out.size // coding.width
    out[: whole * coding.width].reshape(-1, coding.width)[:] = merged[:whole]
    out[whole * coding.width :] = merged[whole:].reshape(-1)[: out.size % coding.width]


def _rotated(raw: Octets, itemsize: int, left: int) -> Octets:
    """Bytes of numbers whose bits are rotated: left by one, sign and mantissa lie below an exponent of whole bits."""
    words = raw.view(f"<u{itemsize}")
    bits = words.dtype.type
    turned = words << bits(left) | words >> bits(8 * itemsize - left)
    octets: Octets = turned.view(np.uint8)
    return octets


def entropy_bits(counts: NDArray[np.int64], width: int, bits: int) -> float:
    """Order-0 entropy in bits of all codes that the symbols consist of (Shannon 1948): what a coder without memory needs.

    ``counts`` ``(planes, 256)``; a symbol of ``width`` bits is made of codes of ``bits`` bits. Each plane has its own
    distribution.
    """
    total = 0.0
    values = np.arange(256)
    for plane in counts:
        codes = np.zeros(1 << bits)
        for shift in range(0, width, bits):
            codes += np.bincount(values >> shift & (1 << bits) - 1, weights=plane, minlength=1 << bits)
        seen = codes[codes > 0]
        total += float((seen * np.log2(seen.sum() / seen)).sum())
    return total
