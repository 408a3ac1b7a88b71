"""Protocol buffers as bytes, as far as ONNX needs them (https://protobuf.dev/programming-guides/encoding).

Field numbers are those of ``onnx.proto`` (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). Fields are written in the
order given, so the same model has the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_VARINT, _DELIMITED, _FIXED32 = 0, 2, 5


def varint(value: int) -> bytes:
    """A number of up to 64 bits, seven bits a byte, the lowest first; negative ones as their two's complement."""
    value &= (1 << 64) - 1
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def number(field: int, value: int) -> bytes:
    """An integer or enum field."""
    return varint(field << 3 | _VARINT) + varint(value)


def real(field: int, value: float) -> bytes:
    """A float field."""
    return varint(field << 3 | _FIXED32) + struct.pack("<f", value)


def data(field: int, value: bytes | str) -> bytes:
    """A field of bytes, of text, or a message that is encoded already."""
    raw = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | _DELIMITED) + varint(len(raw)) + raw


def every(field: int, values: Sequence[bytes | str]) -> bytes:
    """A repeated field of such."""
    return b"".join(data(field, value) for value in values)


def pairs(field: int, values: dict[str, str]) -> bytes:
    """A repeated field of ``StringStringEntryProto``."""
    return every(field, [data(1, key) + data(2, value) for key, value in values.items()])
