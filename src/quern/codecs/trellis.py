"""Trellis codes of 2 to 4 bits: value = row's scale x the sum of one or two table entries (docs/trellis.md).

Weights share bits: the window that picks a weight's entry reaches back over the codes of the weights before it, so that a
table of 2^7 entries does at 2 bits a weight what four levels cannot (trellis-coded quantization, Marcellin and Fischer
1990, doi:10.1109/26.46532; in bit-shift form with small tables, Tseng et al. 2024 (QTIP), arXiv 2406.11235). The streams run
down the columns, so that rounding with error feedback can code one column after the other. Parts:

- ``codes``: uint8, flat; tiles of 256 rows, in them blocks of 4 columns, in them registers of 64 bytes, one for each lane.
- ``scale``: ``scale_dtype`` ``(rows, 1)``.
- ``table``: int8 ``(tables, 2^window)``, entries in -127 ... 127.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from quern import _native
from quern.codecs.base import (
    CODECS,
    Codec,
    Described,
    Encoder,
    KernelForm,
    Parts,
    ScaledParameters,
    least_scale,
    nearest_scale,
    scales_overflow,
)
from quern.codecs.packing.trellis_lanes import BLOCK, LANE_ROWS, TILE, LaneCodec, join_lanes, lane_sets
from quern.codecs.trainable.base import Trainable
from quern.codecs.trainable.trellis import TrellisTrainable
from quern.core.errors import UserError
from quern.core.scheme import CodecScheme
from quern.core.stacking import Traits

TABLES = "trellis_tables.json"
LANES = 64
MANY_TILES = 16
"""From so many on, sets of rows that are rounded one after the other are tiles; of fewer, lanes of tiles."""
LARGEST_SUM = 2 * 127
"""Of the entries of two tables."""


@dataclass(frozen=True)
class TrellisTable:
    """A trained table, as ``tools/train_trellis_tables.py`` writes it."""

    entries: Tensor
    """int8 ``(tables, 2^window)``."""
    unit: float
    """What the integer 1 stands for where the weights have unit variance."""
    distortion: float
    """Mean squared error on a unit Gaussian, tiles of 256 rows."""


@cache
def trained_tables() -> dict[tuple[int, int, int], TrellisTable]:
    """The shipped tables by (bits, window, tables)."""
    stored = json.loads((resources.files("quern.codecs") / TABLES).read_text("utf-8"))
    return {
        (entry["bits"], entry["window"], len(entry["table"])): TrellisTable(
            # The device is said because the first to ask may be building modules on the meta device.
            torch.tensor(entry["table"], dtype=torch.int8, device="cpu"),
            entry["unit"],
            entry["distortion"],
        )
        for entry in stored
    }


def lag(bits: int, window: int, tables: int) -> int:
    """Steps by which the second table's window is older: one. Older ones gain nothing within tiles of 16 steps."""
    return 1 if tables == 2 else 0


def stream_bytes(height: int, bits: int) -> int:
    """Bytes of one lane in a tile of ``height`` rows."""
    return -(-bits * -(-height // LANE_ROWS) // 8)


def windows(streams: Tensor, steps: int, bits: int, window: int, lag: int = 0) -> Tensor:
    """uint8 ``(..., steps, lanes)``: for each step the ``window`` bits that end with the step ``lag`` before it.

    ``streams`` are uint8 ``(..., bytes, lanes)``, read around their end; bit i is bit i % 8 of byte i // 8.
    """
    count = streams.shape[-2]
    found = []
    for step in range(steps):
        first = (bits * (step - lag + 1) - window) % (8 * count)
        low, shift = divmod(first, 8)
        pair = streams[..., low, :].to(torch.int16) | streams[..., (low + 1) % count, :].to(torch.int16) << 8
        found.append((pair >> shift & (1 << window) - 1).to(torch.uint8))
    return torch.stack(found, dim=-2)


class TrellisEncoder(Encoder):
    """Rounds columns by the native encoder (``csrc/trellis``), which is given weights in units of their row's scale."""

    def __init__(self, codec: TrellisCodec, scale: Tensor, columns: int) -> None:
        self.codec = codec
        self.rescale_width = columns
        self._set_scale(scale)
        entries, units = codec.table.entries.numpy(), torch.ones_like(scale).numpy()
        self._native = _native.TrellisEncoder(codec.params.bits, codec.lag, entries, units, columns)

    def _set_scale(self, scale: Tensor) -> None:
        self.scale = scale
        self._inverse = torch.where(scale > 0, 1 / scale, 0.0)

    def rescale(self, first_column: int, factor: Tensor) -> Tensor:
        """See ``Encoder.rescale``; codes are read with the new scales from there on."""
        wanted = least_scale(self.scale * factor.cpu(), self.codec.scale_dtype).to(self.codec.scale_dtype).float()
        usable = (self.scale > 0) & (wanted * LARGEST_SUM).isfinite()
        ratio = torch.where(usable, wanted / self.scale, 1.0)
        self._set_scale(torch.where(usable, wanted, self.scale))
        return ratio.to(factor.device)

    def round(self, first: int, values: Tensor) -> Tensor:
        decoded = torch.empty(values.shape, dtype=torch.float32)
        given = values[0].detach().cpu() * self._inverse
        self._native.round(first, given.numpy(), decoded[0].numpy())
        return decoded.mul_(self.scale).to(values.device)

    def round_all(self, weight: Tensor) -> Tensor:
        decoded = torch.empty(weight.shape, dtype=torch.float32)
        given = weight.detach().cpu() * self._inverse[:, None]
        self._native.round_all(given.numpy(), decoded.numpy())
        return decoded.mul_(self.scale[:, None]).to(weight.device)

    def parts(self) -> Parts:
        return {
            "codes": torch.from_numpy(self._native.codes()),
            "scale": self.scale.unsqueeze(1).to(self.codec.scale_dtype),
            "table": self.codec.table.entries.clone(),
        }


class TrellisParameters(ScaledParameters):
    """Scales lie at rows, and the observer is not asked."""

    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: Annotated[int, Field(ge=1)] | None = None
    window: Annotated[int, Field(ge=1)] = 7
    """Bits of the stream that pick an entry of a table."""
    tables: Annotated[int, Field(ge=1)] = 2
    """Tables whose entries are added."""


@CODECS.add("trellis")
class TrellisCodec(Codec):
    """Trellis codes; see the module's page for what is stored."""

    Parameters = TrellisParameters
    technique = "trellis-coded"
    trains_codes = True
    slab_rows = TILE

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.params, TrellisParameters)
        self.params = params = scheme.params
        key = (params.bits, params.window, params.tables)
        if params.granularity != "channel" or not params.symmetric or key not in trained_tables():
            raise UserError(
                f"codec trellis stores 2, 3 or 4 bits, symmetric, with granularity channel, window 6 with one table or "
                f"7 with one or two; the recipe asks for {params.bits} bits, symmetric: {params.symmetric}, granularity "
                f"{params.granularity}, window: {params.window}, tables: {params.tables}. Change these keys"
            )
        self.table = trained_tables()[key]
        self.window, self.tables, self.lag = key[1], key[2], lag(*key)
        self.scale_dtype: torch.dtype = getattr(torch, params.scale_dtype)

    @property
    def traits(self) -> Traits:
        return Traits(wants={"even columns": "a row has one scale and a table that was trained on Gaussian numbers"})

    def describe(self) -> Described:
        return Described(self.params.granularity, self.params.bits)

    @property
    def scale_dtype_name(self) -> str:
        return self.params.scale_dtype

    def row_scales(self, weight: Tensor) -> Tensor:
        """Scales as they will be stored, float32 ``(rows,)``: the table's unit for weights of each row's variance."""
        scale = self.ideal_scales(weight)
        least = least_scale(scale, self.scale_dtype)
        stored = torch.where(scale > 0, least, 0.0).to(self.scale_dtype).float()
        if not bool((stored * LARGEST_SUM).isfinite().all()):
            raise scales_overflow(weight, self.params.scale_dtype)
        return stored

    def ideal_scales(self, weight: Tensor) -> Tensor:
        weight = weight.detach().cpu()
        largest = weight.abs().amax(dim=1)
        relative = weight / torch.where(largest > 0, largest, 1.0)[:, None]  # its squares cannot overflow
        return largest * relative.square().mean(dim=1).sqrt() * self.table.unit

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> TrellisEncoder:
        return TrellisEncoder(self, self.row_scales(weight), weight.shape[1])

    def encoder_at(self, scale: Tensor, columns: int) -> TrellisEncoder:
        """An encoder for rows of the given scales float32 ``(rows,)``, which are numbers that can be stored."""
        return TrellisEncoder(self, scale, columns)

    def nearest_scale(self, scale: Tensor) -> Tensor:
        """The scale next to float32 ``scale`` that can be stored."""
        return nearest_scale(scale, self.scale_dtype)

    def fold(self, parts: Parts, factors: Tensor) -> Parts:
        scale = self.nearest_scale(parts["scale"].float() * factors[:, None])
        return {**parts, "scale": scale.to(self.scale_dtype)}

    def trainable(self, shape: tuple[int, int], parts: Parts, weight: Tensor | None) -> Trainable:
        return super().trainable(shape, parts, None) if weight is None else TrellisTrainable(self, shape, parts)

    def join(self, slabs: list[Parts]) -> Parts:
        return super().join(slabs) | {"table": slabs[0]["table"]}

    def row_sets(self, rows: int, most: int) -> list[tuple[Tensor, Codec]]:
        if rows >= MANY_TILES * TILE:
            return super().row_sets(rows, most)
        return [(lanes.rows, LaneCodec(self, lanes)) for lanes in lane_sets(rows)]

    def join_sets(self, rows: int, parts: list[Parts]) -> Parts:
        if rows >= MANY_TILES * TILE:
            return self.join(parts)
        return join_lanes(rows, partial(stream_bytes, bits=self.params.bits), parts)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        whole, rest = divmod(rows, TILE)
        a_block = whole * stream_bytes(TILE, self.params.bits) + stream_bytes(rest, self.params.bits)
        return {
            "codes": ((a_block * -(-columns // BLOCK) * LANES,), torch.uint8),
            "scale": ((rows, 1), self.scale_dtype),
            "table": ((self.tables, 1 << self.window), torch.int8),
        }

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self.integers(shape, parts).float().mul_(parts["scale"].float())

    def kernel(self, shape: tuple[int, int]) -> KernelForm:
        return KernelForm(
            "trellis",
            {"codes": "codes", "scale": "scale", "table": "table"},
            {
                "scale_type": self.params.scale_dtype,
                "bits": self.params.bits,
                "window": self.window,
                "tables": self.tables,
                "lag": self.lag,
            },
        )

    def integers(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        """The sums of table entries, int16 ``(rows, columns)``."""
        rows, columns = shape
        table = parts["table"].to(torch.int16)
        values = table.new_empty(rows, columns)
        whole = rows // TILE * TILE
        done = 0
        for first, last in ((0, whole), (whole, rows)):
            if first == last:
                continue
            height = min(TILE, last - first)
            tiles, blocks = (last - first) // height, -(-columns // BLOCK)
            size = tiles * blocks * stream_bytes(height, self.params.bits) * LANES
            streams = parts["codes"][done : done + size].view(tiles, blocks, -1, LANES)
            done += size
            sums = self._sums(streams, -(-height // LANE_ROWS), table)
            # (tile, block, step, row, column) to (tile, step, row, block, column)
            lanes = sums.view(tiles, blocks, -1, LANE_ROWS, BLOCK)
            spread = lanes.permute(0, 2, 3, 1, 4).reshape(tiles, -1, blocks * BLOCK)
            values[first:last] = spread[:, :height, :columns].reshape(last - first, columns)
        return values

    def _sums(self, streams: Tensor, steps: int, table: Tensor) -> Tensor:
        sums = table[0][windows(streams, steps, self.params.bits, self.window).int()]
        if self.tables == 2:
            sums = sums + table[1][windows(streams, steps, self.params.bits, self.window, self.lag).int()]
        return sums
