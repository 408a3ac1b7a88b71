"""Rounding a trellis-coded matrix lane by lane, so that rows of one tile can make up for others of it.

A tile of 256 rows has 16 lanes of 16 rows, whose streams do not know each other (``trellis``). So a few lanes of a tile can
be rounded once others are. The encoder takes sixteen lanes at a time; here they come from several tiles, and are a tile of
their own until ``join`` puts the codes where they belong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quern.codecs.base import Codec, Described, Encoder, Parts

if TYPE_CHECKING:
    from quern.codecs.trellis import TrellisCodec

TILE, LANE_ROWS, BLOCK = 256, 16, 4
LANES = 4
"""Of each tile, in a set; four tiles fill an encoder."""


class LaneSet:
    """Some lanes of up to four tiles of equal height."""

    def __init__(self, first_row: int, tiles: int, height: int, lane: int) -> None:
        """``lane``: the first of them; of ``tiles`` tiles of ``height`` rows from ``first_row`` on."""
        self.first_row, self.tiles, self.height, self.lane = first_row, tiles, height, lane
        steps = -(-height // LANE_ROWS)
        self.encoded_rows = steps * LANE_ROWS
        step, tile, own = torch.meshgrid(
            torch.arange(steps), torch.arange(LANE_ROWS // LANES), torch.arange(LANES), indexing="ij"
        )
        inside = step * LANE_ROWS + lane + own
        there = ((tile < tiles) & (inside < height)).flatten()
        self.rows = (first_row + tile * height + inside).flatten()[there]
        """Rows of the matrix, int64, in the order of their places."""
        self.places = there.nonzero()[:, 0]
        """Where they lie in the encoder's tile."""

    def spread(self, values: Tensor) -> Tensor:
        """``values`` of the rows ``(rows, ...)`` at their places, ``(encoded rows, ...)``; zeros elsewhere."""
        found = values.new_zeros(self.encoded_rows, *values.shape[1:])
        found[self.places] = values
        return found


def lane_sets(rows: int) -> list[LaneSet]:
    """All lanes of a matrix of ``rows``: whole tiles first, each set of tiles lane by lane."""
    whole, rest = divmod(rows, TILE)
    across = LANE_ROWS // LANES
    found = [
        LaneSet(tile * TILE, min(across, whole - tile), TILE, lane)
        for tile in range(0, whole, across)
        for lane in range(0, LANE_ROWS, LANES)
    ]
    return found + [
        some for lane in range(0, LANE_ROWS, LANES) if rest and len((some := LaneSet(whole * TILE, 1, rest, lane)).rows)
    ]


class LaneCodec(Codec):
    """Rounds the rows of a set; the encoder's other lanes hold zeros. Its parts are those of the encoder's tile."""

    def __init__(self, codec: TrellisCodec, lanes: LaneSet) -> None:
        super().__init__(codec.scheme)
        self.codec, self.lanes = codec, lanes
        self.slab_rows = lanes.encoded_rows  # a set is never cut

    def describe(self) -> Described:
        return self.codec.describe()

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> LaneEncoder:
        return LaneEncoder(self.codec.encoder(self.lanes.spread(weight), whole, refit), self.lanes)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.codec.part_shapes((self.lanes.encoded_rows, shape[1]))

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self.codec.decode((self.lanes.encoded_rows, shape[1]), parts)[self.lanes.places]


class LaneEncoder(Encoder):
    """Hands rows to the encoder at their places."""

    def __init__(self, encoder: Encoder, lanes: LaneSet) -> None:
        self._encoder, self._lanes = encoder, lanes
        self.rescale_width = encoder.rescale_width

    def rescale(self, first_column: int, factor: Tensor) -> Tensor:
        return self._encoder.rescale(first_column, self._lanes.spread(factor))[self._lanes.places]

    def round(self, first: int, values: Tensor) -> Tensor:
        return self._encoder.round(first, self._lanes.spread(values[0])[None])[:, self._lanes.places]

    def parts(self) -> Parts:
        return self._encoder.parts()


def join_lanes(rows: int, stream_bytes: Callable[[int], int], parts: list[Parts]) -> Parts:
    """Parts of a matrix of ``rows`` from those of its ``lane_sets``; ``stream_bytes``: of a lane of a tile by its height."""
    sets = lane_sets(rows)
    scale = torch.empty(rows, 1, dtype=parts[0]["scale"].dtype)
    found: dict[int, Tensor] = {}
    across = LANE_ROWS // LANES
    for lanes, some in zip(sets, parts, strict=True):
        scale[lanes.rows] = some["scale"][lanes.places]
        size = stream_bytes(lanes.height)
        codes = some["codes"].view(-1, size, across, LANES, BLOCK)  # (block, byte, tile, lane, column)
        if lanes.first_row not in found:
            found[lanes.first_row] = codes.new_zeros(lanes.tiles, len(codes), size, LANE_ROWS, BLOCK)
        own = codes.permute(2, 0, 1, 3, 4)[: lanes.tiles]
        found[lanes.first_row][:, :, :, lanes.lane : lanes.lane + LANES] = own
    codes = torch.cat([tile.flatten() for _, tile in sorted(found.items())])
    return {"codes": codes, "scale": scale, "table": parts[0]["table"]}
