"""Random packed matrices for the kernels, and what their products must be, in plain numpy.

The rule of the results (csrc/kernels/kernels.h) is followed to the last bit: integers are summed exactly, then one fused
multiply-add a group. ``fma`` emulates it in 80-bit numbers, which hold the product of two float32 numbers exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TILE = 256
SCALE_TYPES = ("float16", "bfloat16", "float32")
assert np.finfo(np.longdouble).nmant >= 63, "the emulation of fma needs 80-bit numbers"


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c, rounded once."""
    return (a.astype(np.longdouble) * b + c).astype(np.float32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 ``values``, uint16."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes below 16 ``(rows, columns)``, two a byte, low first, rows filled up to whole words."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 8) * 8), np.uint8)
    padded[:, :columns] = codes
    return padded[:, ::2] | padded[:, 1::2] << 4


@dataclass
class Packed:
    """Arrays of one matrix, its integer values, and keywords for ``_native.Matrix``."""

    kind: str
    rows: int
    columns: int
    arrays: dict[str, np.ndarray]
    values: np.ndarray  # (rows, columns): int64, or float32 of the plain kinds
    scale: np.ndarray | None = None  # (rows, groups) float32
    group: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """What ``_native.Matrix`` takes, but for the arrays."""
        return {"kind": self.kind, "rows": self.rows, "columns": self.columns, "group": self.group, **self.options}

    @property
    def activation_group(self) -> int:
        return self.group or self.columns

    def product(self, inputs: np.ndarray) -> np.ndarray:
        """(tokens, rows) float32."""
        return plain_product(self, inputs) if self.scale is None else packed_product(self, inputs)


def quantize(inputs: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 values (as int64) and scales (tokens, groups) of finite ``inputs``."""
    tokens, columns = inputs.shape
    values, scales = np.zeros((tokens, columns), np.int64), []
    for first in range(0, columns, group):
        part = inputs[:, first : first + group]
        top = np.abs(part).max(axis=1)
        small = top < np.float32(2.0**-100)
        safe = np.where(small, np.float32(1), top)
        inverse = np.float32(127) / safe
        values[:, first : first + group] = np.where(small[:, None], 0, np.rint(part * inverse[:, None]))
        scales.append(np.where(small, np.float32(0), safe / np.float32(127)))
    return values, np.stack(scales, axis=1)


def quantize_by(inputs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 values (as int64) of ``inputs`` (tokens, columns) by a given ``scale``, which broadcasts to them."""
    with np.errstate(over="ignore"):  # what overflows lies beyond the range, as it should
        scaled = inputs * (np.float32(1) / scale)
    return np.rint(np.clip(scaled, np.float32(-127), np.float32(127))).astype(np.int64)


def packed_product(matrix: Packed, inputs: np.ndarray) -> np.ndarray:
    assert matrix.scale is not None
    group = matrix.activation_group
    x, xs = quantize(inputs, group)
    out = np.zeros((len(inputs), matrix.rows), np.float32)
    for index, first in enumerate(range(0, matrix.columns, group)):
        part = slice(first, first + group)
        sums = x[:, part] @ matrix.values[:, part].T
        assert np.abs(sums).max() < 2**31
        scale = xs[:, index, None] * matrix.scale[None, :, index]
        out = fma(sums.astype(np.int32).astype(np.float32), scale, out)
    return out


def plain_product(matrix: Packed, inputs: np.ndarray) -> np.ndarray:
    lanes = np.zeros((len(inputs), matrix.rows, 16), np.float32)
    for first in range(0, matrix.columns, 16):
        part = slice(first, min(first + 16, matrix.columns))
        width = part.stop - first
        lanes[:, :, :width] = fma(matrix.values[None, :, part], inputs[:, None, part], lanes[:, :, :width])
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :, :width] + lanes[:, :, width : 2 * width]
    return lanes[:, :, 0]


def stored(scale: np.ndarray, scale_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of ``scale`` in its type, and the float32 numbers that they mean."""
    if scale_type == "bfloat16":
        halves = bfloat16(scale)
        return halves, (halves.astype(np.uint32) << 16).view(np.float32)
    typed = scale.astype(scale_type)
    return typed, typed.astype(np.float32)


class Maker:
    """Random matrices of one seed. ``extreme``: all codes at one end, which is where narrow sums overflow."""

    def __init__(self, seed: int = 0, extreme: bool = False) -> None:
        self.random, self.extreme = np.random.default_rng(seed), extreme

    def codes(self, levels: int, shape: tuple[int, ...]) -> np.ndarray:
        if self.extreme:
            return np.full(shape, levels - 1, np.uint8)
        return self.random.integers(0, levels, shape, dtype=np.uint8)

    def scales(self, rows: int, groups: int, scale_type: str, one_scale: bool) -> tuple[np.ndarray, np.ndarray]:
        shape = (1 if one_scale else rows, groups)
        # Over several powers of two, a few subnormal in float16.
        scale = np.exp2(self.random.uniform(-16, 0, shape)).astype(np.float32)
        data, meant = stored(scale, scale_type)
        return data, np.broadcast_to(meant, (rows, groups))

    def integer4(self, rows, columns, group=None, zeros=False, scale_type="float16", one_scale=False) -> Packed:
        groups = -(-columns // (group or columns))
        codes = self.codes(16, (rows, columns))
        data, scale = self.scales(rows, groups, scale_type, one_scale)
        arrays = {"codes": pack_nibbles(codes), "scale": data}
        zero = np.full((rows, groups), 8, np.int64)
        if zeros:
            few = self.random.integers(0, 16, (1 if one_scale else rows, groups), dtype=np.uint8)
            zero = np.broadcast_to(few.astype(np.int64), (rows, groups))
            arrays["zeros"] = np.ascontiguousarray(pack_nibbles(few.T).view(np.int32).T)
        values = codes.astype(np.int64) - np.repeat(zero, group or columns, axis=1)[:, :columns]
        options = {"scale_type": scale_type, "one_scale": one_scale}
        return Packed("integer4", rows, columns, arrays, values, scale, group, options)

    def codebook4(self, rows, columns, group=None, scale_type="float16") -> Packed:
        made = self.integer4(rows, columns, group, scale_type=scale_type)
        table = self.random.integers(-128, 128, 16).astype(np.int8)
        table[[0, 15]] = -128, 127
        values = table[made.values + 8].astype(np.int64)
        return Packed(
            "codebook4", rows, columns, made.arrays | {"table": table}, values, made.scale, group, made.options
        )

    def integer8(self, rows, columns, group=None, scale_type="float16", one_scale=False) -> Packed:
        groups = -(-columns // (group or columns))
        codes = (self.codes(256, (rows, columns)).astype(np.int16) - 128).astype(np.int8)
        data, scale = self.scales(rows, groups, scale_type, one_scale)
        options = {"scale_type": scale_type, "one_scale": one_scale}
        return Packed(
            "integer8", rows, columns, {"codes": codes, "scale": data}, codes.astype(np.int64), scale, group, options
        )

    def trellis(self, rows, columns, bits=2, window=6, tables=1, lag=0, fits=True, scale_type="float16") -> Packed:
        blocks = -(-columns // 4)
        heights = [min(TILE, rows - first) for first in range(0, rows, TILE)]
        size = 64 * blocks * sum(-(-bits * -(-height // 16) // 8) for height in heights)
        codes = self.codes(256, (size,))
        bound = 127 if tables == 1 or not fits else 63
        table = self.random.integers(-bound - 1, bound + 1, tables << window).astype(np.int8)
        if self.extreme:
            table[:] = bound
        data, scale = self.scales(rows, 1, scale_type, False)
        values = decode_trellis(codes, heights, columns, bits, window, table.reshape(tables, -1), lag)
        options = {"bits": bits, "window": window, "tables": tables, "lag": lag, "scale_type": scale_type}
        return Packed(
            "trellis", rows, columns, {"codes": codes, "scale": data, "table": table}, values, scale, None, options
        )

    def plain(self, kind, rows, columns) -> Packed:
        values = self.random.standard_normal((rows, columns)).astype(np.float32)
        if kind == "float32":
            return Packed(kind, rows, columns, {"codes": values}, values)
        halves = bfloat16(values)
        return Packed(kind, rows, columns, {"codes": halves}, (halves.astype(np.uint32) << 16).view(np.float32))


def decode_trellis(codes, heights, columns, bits, window, tables, lag) -> np.ndarray:
    """Values (rows, columns), from the description of the layout in csrc/kernels/weight.h and nothing else."""
    blocks, values, at = -(-columns // 4), [], 0
    for height in heights:
        steps = -(-height // 16)
        registers = -(-bits * steps // 8)
        tile = codes[at : at + 64 * blocks * registers].reshape(blocks, registers, 64)
        at += tile.size
        # (blocks, lanes, bits of the stream): bit i is bit i % 8 of byte i / 8.
        stream = np.unpackbits(tile.transpose(0, 2, 1), axis=2, bitorder="little").astype(np.int64)
        part = np.zeros((steps, blocks, 64), np.int64)
        for step in range(steps):
            for index, table in enumerate(tables):
                end = bits * (step - index * lag + 1)
                where = np.arange(end - window, end) % (8 * registers)
                part[step] += table[stream[:, :, where] @ (1 << np.arange(window))]
        # lane = row % 16 * 4 + column % 4
        grid = part.reshape(steps, blocks, 16, 4).transpose(0, 2, 1, 3).reshape(steps * 16, blocks * 4)
        values.append(grid[:height, :columns])
    return np.concatenate(values)
