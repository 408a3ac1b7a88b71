"""Random packed matrices for timing kernels, many copies of each, and what else the machine did meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quern import _native

POOL_BYTES = 1 << 30
"""Memory that copies of a matrix lie in: more than the last-level cache, so that each copy comes from memory."""

SUPER = 256
"""Weights of a super-block."""


@dataclass(frozen=True)
class Packing:
    """A way to store a matrix: bits of a code and keywords of ``_native.Matrix``."""

    name: str
    kind: str
    bits: int
    group: int | None = None
    zeros: bool = False
    window: int = 0
    tables: int = 1
    lag: int = 0
    shared: str = "tensor"
    """Who shares a codebook's table: tensor, or row."""
    scale_bytes: int = 2
    scale_type: str = "float16"
    super_bytes: int = 0
    """Bytes of a super-block of 256 weights, in which scales lie with the codes; 0: other kinds."""
    table_bytes: int = 0
    """Sizes of the points of a grid, of super-blocks of such points."""

    def code_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the codes alone, or of super-blocks with all that is in them."""
        if self.super_bytes:
            return rows * columns // SUPER * self.super_bytes
        if self.kind != "trellis":
            return rows * columns * self.bits // 8
        full, rest = divmod(rows, 256)
        return 64 * -(-columns // 4) * (full * 2 * self.bits + -(-self.bits * -(-rest // 16) // 8))

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of the codes, of scales and of zero points (half a byte each)."""
        if self.super_bytes:
            return self.code_bytes(rows, columns)
        groups = rows * -(-columns // (self.group or columns))
        return self.code_bytes(rows, columns) + self.scale_bytes * groups + (groups // 2 if self.zeros else 0)

    def matrix(self, rows: int, columns: int, codes: np.ndarray) -> _native.Matrix:
        """The matrix of ``codes`` (uint8) with scales of one."""
        if self.super_bytes:
            sizes = np.random.default_rng(0).integers(1, 62, self.table_bytes).astype(np.int8)
            table = sizes if self.table_bytes else None
            return _native.Matrix(self.kind, rows, columns, codes, group=self.group, table=table)
        groups = -(-columns // (self.group or columns))
        ones = np.ones(rows * groups, np.float16).view(np.uint8)
        if self.scale_bytes == 1:
            ones = np.full(rows * groups, 127 if self.scale_type == "float8_e8m0fnu" else 0x38, np.uint8)
        keywords: dict[str, Any] = {"scale": ones, "group": self.group, "scale_type": self.scale_type}
        if self.zeros:
            keywords["zeros"] = np.full(-(-rows // 8) * groups, 0x77777777, np.int32).view(np.uint8)
        if self.kind == "trellis":
            table = np.random.default_rng(0).integers(-63, 63, self.tables << self.window).astype(np.int8)
            keywords |= {
                "table": table,
                "bits": self.bits,
                "window": self.window,
                "tables": self.tables,
                "lag": self.lag,
            }
        if self.kind.startswith("codebook"):
            table = np.linspace(-127, 127, 1 << self.bits).astype(np.int8)
            keywords["table"] = table if self.shared == "tensor" else np.tile(table, rows)
        return _native.Matrix(self.kind, rows, columns, codes, **keywords)


LINE = 64


class Pool:
    """Random bytes, of which matrices are views."""

    def __init__(self, bytes_: int = POOL_BYTES) -> None:
        random = np.random.default_rng(1).integers(0, 256, bytes_ + LINE, dtype=np.uint8)
        first = -random.ctypes.data % LINE  # as tensors lie in an artifact
        self.bytes = random[first : first + bytes_]

    def parts(self, size: int) -> list[np.ndarray]:
        """As many pieces of ``size`` bytes as there are, but two at least."""
        count = max(2, len(self.bytes) // size)
        return [self.bytes[i * size : (i + 1) * size] for i in range(min(count, len(self.bytes) // size))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the middle half of ``values``."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def rounds_of(count: int, contenders: dict[Any, Callable[[], float]]) -> dict[Any, list[float]]:
    """Seconds of each contender in each of ``count`` rounds, in which they take turns. One round before warms up."""
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for number in range(count + 1):
        for name, run in contenders.items():
            seconds = run()
            if number > 0:
                times[name].append(seconds)
    return times
