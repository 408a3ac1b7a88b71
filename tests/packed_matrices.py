"""Random packed matrices for the kernels, and what their products must be, in plain numpy.

The rule of the results (csrc/kernels/kernels.h) is followed to the last bit: integers are summed exactly, then one fused
multiply-add a group. ``fma`` emulates it in 80-bit numbers, which hold the product of two float32 numbers exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quern.codecs.blocks.plain import IQ4
from quern.codecs.blocks.points import OCTET, TYPES, grid_of
from quern.codecs.packing import ggml, ggml_super

TILE = 256
SCALE_TYPES = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu")
SUPERBLOCKS = {
    "q2_k": (2, 16, 4, True, None),
    "q3_k": (3, 16, 6, False, None),
    "q4_k": (4, 32, 6, True, None),
    "q5_k": (5, 32, 6, True, None),
    "q6_k": (6, 16, 8, False, None),
    "iq4_xs": (4, 32, 6, False, np.array(IQ4, np.int64)),
}
"""Bits of a code, columns of a group, bits of a whole number of a scale, whether there are minimums, and levels."""
POINTS = {name.lower(): kind for name, kind in TYPES.items()}
AFFINE = {"q4_1": 4, "q5_1": 5}
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


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes ``(rows, columns)``, least significant bit first, rows filled up to whole 32-bit words."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    stream = np.zeros((rows, words * 32), np.uint8)
    stream[:, : columns * bits] = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little").reshape(
        rows, -1
    )
    return np.packbits(stream, axis=1, bitorder="little")


def pack_three(codes: np.ndarray) -> np.ndarray:
    """uint8 codes below 8: the lower two bits of a row, then of every 256 columns four planes of third bits."""
    parts = [pack_bits(codes & 3, 2)]
    for first in range(0, codes.shape[1], 256):
        third = codes[:, first : first + 256] >> 2
        width = -(-third.shape[1] // 32)
        for plane in range(4):
            bits = np.packbits(third[:, plane::4], axis=1, bitorder="little")
            parts.append(np.pad(bits, ((0, 0), (0, width - bits.shape[1]))))
    return np.concatenate(parts, axis=1)


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
    minimum: np.ndarray | None = None  # (rows, groups) float32

    def keywords(self) -> dict[str, Any]:
        """What ``_native.Matrix`` takes, but for the arrays."""
        return {"kind": self.kind, "rows": self.rows, "columns": self.columns, "group": self.group, **self.options}

    @property
    def activation_group(self) -> int:
        return self.group or self.columns

    def product(self, inputs: np.ndarray) -> np.ndarray:
        """(tokens, rows) float32."""
        if self.scale is None:
            return plain_product(self.values, inputs)
        return scaled_product(self, inputs) if self.kind.startswith("float8") else packed_product(self, inputs)


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
    if matrix.minimum is None:
        return out
    low = np.zeros_like(out)
    for index, first in enumerate(range(0, matrix.columns, group)):
        total = x[:, first : first + group].sum(axis=1).astype(np.float32) * xs[:, index]
        low = fma(np.broadcast_to(matrix.minimum[None, :, index], low.shape), total[:, None], low)
    return out + low


def plain_product(values: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    rows, columns = values.shape
    lanes = np.zeros((len(inputs), rows, 16), np.float32)
    for first in range(0, columns, 16):
        part = slice(first, min(first + 16, columns))
        width = part.stop - first
        lanes[:, :, :width] = fma(values[None, :, part], inputs[:, None, part], lanes[:, :, :width])
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :, :width] + lanes[:, :, width : 2 * width]
    return lanes[:, :, 0]


def scaled_product(matrix: Packed, inputs: np.ndarray) -> np.ndarray:
    """Plain numbers with scales: each group as plain numbers, then one fused multiply-add."""
    assert matrix.scale is not None
    out, group = np.zeros((len(inputs), matrix.rows), np.float32), matrix.activation_group
    for index, first in enumerate(range(0, matrix.columns, group)):
        part = slice(first, first + group)
        sums = plain_product(matrix.values[:, part], np.ascontiguousarray(inputs[:, part]))
        out = fma(sums, np.broadcast_to(matrix.scale[None, :, index], sums.shape), out)
    return out


def float8_table(variant: str) -> np.ndarray:
    """float32 (256,): what each byte means (OCP 8-bit Floating Point Specification 1.0)."""
    exponent_bits, fraction_bits, bias = (4, 3, 7) if variant == "e4m3" else (5, 2, 15)
    found = []
    for byte in range(256):
        sign, exponent = -1.0 if byte & 0x80 else 1.0, byte >> fraction_bits & (1 << exponent_bits) - 1
        fraction = (byte & (1 << fraction_bits) - 1) / (1 << fraction_bits)
        number = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        found.append(sign * number)
    table = np.array(found, np.float32)
    if variant == "e4m3":
        table[[0x7F, 0xFF]] = np.nan
    else:
        table[0x7C:0x80] = [np.inf, np.nan, np.nan, np.nan]
        table[0xFC:] = [-np.inf, np.nan, np.nan, np.nan]
    return table


def stored(scale: np.ndarray, scale_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of ``scale`` in its type, and the float32 numbers that they mean."""
    if scale_type == "bfloat16":
        halves = bfloat16(scale)
        return halves, (halves.astype(np.uint32) << 16).view(np.float32)
    if scale_type == "float8_e8m0fnu":
        exponents = np.clip(np.round(np.log2(scale)) + 127, 0, 254).astype(np.uint8)
        return exponents, np.exp2(exponents.astype(np.float64) - 127).astype(np.float32)
    if scale_type == "float8_e4m3fn":
        table = float8_table("e4m3")[:0x7F]
        nearest = np.abs(scale[..., None] - table).argmin(-1).astype(np.uint8)
        return nearest, table[nearest]
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

    def codebook(self, bits, rows, columns, group=None, scale_type="float16", shared="tensor", factor=1.0) -> Packed:
        """``shared``: who shares a table: tensor, row or group."""
        groups, entries = -(-columns // (group or columns)), 1 << bits
        codes = self.codes(entries, (rows, columns))
        data, scale = self.scales(rows, groups, scale_type, False)
        owners = {"tensor": (1, 1), "row": (rows, 1), "group": (rows, groups)}[shared]
        table = self.random.integers(-128, 128, (*owners, entries)).astype(np.int8)
        table[..., 0], table[..., -1] = -128, 127
        which = np.broadcast_to(np.arange(columns) // (group or columns), (rows, columns)) % owners[1]
        values = table[np.arange(rows)[:, None] % owners[0], which, codes].astype(np.int64)
        arrays = {"codes": pack_three(codes) if bits == 3 else pack_bits(codes, bits), "scale": data, "table": table}
        options = {"scale_type": scale_type, "scale_factor": factor}
        return Packed(f"codebook{bits}", rows, columns, arrays, values, scale * np.float32(factor), group, options)

    def codebook4(self, rows, columns, group=None, scale_type="float16") -> Packed:
        return self.codebook(4, rows, columns, group, scale_type)

    def float8(self, variant, rows, columns, group=None, scale_type="float16") -> Packed:
        """Numbers of 8 bits but no NaN, whose products are those of plain numbers, group by group."""
        groups = -(-columns // (group or columns))
        codes = self.codes(256, (rows, columns))
        unusual = (0x7F, 0xFF) if variant == "e4m3" else (0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF)
        codes[np.isin(codes, unusual)] = 0x12
        data, scale = self.scales(rows, groups, scale_type, False)
        unit = 256 if variant == "e4m3" else 1
        values = float8_table(variant)[codes] / np.float32(unit)
        options = {"scale_type": scale_type}
        return Packed(f"float8_{variant}", rows, columns, {"codes": codes, "scale": data}, values,
                      scale * np.float32(unit), group, options)  # fmt: skip

    def integer8(self, rows, columns, group=None, scale_type="float16", one_scale=False) -> Packed:
        groups = -(-columns // (group or columns))
        codes = (self.codes(256, (rows, columns)).astype(np.int16) - 128).astype(np.int8)
        data, scale = self.scales(rows, groups, scale_type, one_scale)
        options = {"scale_type": scale_type, "one_scale": one_scale}
        return Packed(
            "integer8", rows, columns, {"codes": codes, "scale": data}, codes.astype(np.int64), scale, group, options
        )

    def superblocks(self, kind, rows, columns) -> Packed:
        """ggml's super-blocks of 256 columns; scales over several powers of two, a few subnormal in float16."""
        bits, group, scale_bits, has_minimums, levels = SUPERBLOCKS[kind]
        supers, groups, each = columns // 256, columns // group, 256 // group
        codes = self.codes(1 << bits, (rows, columns))
        whole = self.codes(1 << scale_bits, (rows, groups))
        lows = self.codes(1 << scale_bits, (rows, groups))
        d, low_d = (np.exp2(self.random.uniform(-22, -6, (rows, supers))).astype(np.float16) for _ in range(2))
        parts = [codes.reshape(rows, supers, 256), whole.reshape(rows, supers, each)]
        parts += [lows.reshape(rows, supers, each)] if has_minimums else []
        halves = [d, low_d] if has_minimums else [d]
        fields = [torch.from_numpy(part) for part in parts]
        fields += [torch.from_numpy(half.view(np.uint8).reshape(rows, supers, 2)) for half in halves]
        data = getattr(ggml_super, kind)(*fields).numpy()
        values = levels[codes] if levels is not None else codes.astype(np.int64)
        signed = whole.astype(np.float32) - np.float32(0 if has_minimums else 1 << scale_bits - 1)
        scale = np.repeat(d.astype(np.float32), each, axis=1) * signed
        minimum = None
        if has_minimums:
            minimum = -(np.repeat(low_d.astype(np.float32), each, axis=1) * lows.astype(np.float32))
        elif levels is None:
            values = values - (1 << bits - 1)
        return Packed(kind, rows, columns, {"codes": data}, values, scale, group, {}, minimum)

    def affine_blocks(self, kind, rows, columns) -> Packed:
        """ggml's blocks of 32 columns with minimums."""
        bits, groups = AFFINE[kind], columns // ggml.BLOCK
        codes = self.codes(1 << bits, (rows, columns))
        (_, scale), (_, low) = (self.scales(rows, groups, "float16", False) for _ in range(2))
        minimum = low * self.random.choice(np.array([-1, 1], np.float32), low.shape)
        fields = (torch.from_numpy(np.array(field)) for field in (codes, scale, minimum))
        data = ggml.affine_blocks(*fields, bits).numpy()
        return Packed(kind, rows, columns, {"codes": data}, codes.astype(np.int64), scale, ggml.BLOCK, {}, minimum)

    def points(self, kind, rows, columns) -> Packed:
        """ggml's super-blocks of points of a grid with signs."""
        of = POINTS[kind]
        grid = grid_of(of.name, torch.device("cpu"))
        supers, octets, each = columns // 256, columns // OCTET, 256 // of.group
        points = self.random.integers(0, 1 << of.point_bits, (rows, columns // of.width))
        if self.extreme:
            points[:] = int(grid.points.sum(1).argmax())
        signs = self.codes(256, (rows, octets))
        if of.even:
            odd = np.unpackbits(signs[..., None] & 127, axis=-1).sum(-1) % 2
            signs = (signs & 127 | odd << 7).astype(np.uint8)
        whole = self.codes(16, (rows, supers * each))
        d = np.exp2(self.random.uniform(-22, -6, (rows, supers))).astype(np.float16)
        halves = torch.from_numpy(d.view(np.uint8).reshape(rows, supers, 2))
        fields = (torch.from_numpy(field.reshape(rows, supers, -1)) for field in (points, signs, whole))
        data = of.pack(*fields, halves).numpy()
        values = grid.decode(
            *(torch.from_numpy(field) for field in (points.reshape(rows, octets, -1), signs.astype(np.int64)))
        )
        scale = np.repeat(d.astype(np.float32), each, axis=1) * np.float32(of.unit) * (2 * whole.astype(np.float32) + 1)
        arrays = {"codes": data, "table": grid.points.numpy().astype(np.int8)}
        return Packed(kind, rows, columns, arrays, values.flatten(1).numpy().astype(np.int64), scale, of.group)

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
