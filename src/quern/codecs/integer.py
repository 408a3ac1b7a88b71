"""Uniform integers of 1 to 8 bits: value = (code - zero point) x scale (Jacob et al. 2018, arXiv 1712.05877, eq. 1).

Codes are unsigned. A symmetric grid has the fixed zero point 2^(bits-1); an asymmetric one stores an integer zero point
beside every scale. Parts:

- ``codes``: int8 ``(rows, columns)``, code - 128, for symmetric 8 bits; otherwise int32, bit-packed along the row.
- ``scale``: ``scale_dtype`` ``(rows, groups)``; ``(rows, 1)`` per channel, ``(1, 1)`` per tensor.
- ``zero_point`` (asymmetric only): int32, bit-packed down the rows, ``(words_per_row(rows), groups)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quern.codecs import bits
from quern.codecs.base import CODECS, Codec, Described, Encoder, Parts, ScaledParameters, least_scale
from quern.core.errors import UserError
from quern.core.scheme import CodecScheme
from quern.observers.base import OBSERVERS

if TYPE_CHECKING:
    from quern.observers.base import Observer


class Grid:
    """The integer grid of one scheme: ranges to scales, values to codes and back."""

    def __init__(self, params: ScaledParameters) -> None:
        self.levels = (1 << params.bits) - 1
        self.middle = 1 << (params.bits - 1)
        self.symmetric = params.symmetric
        self.scale_dtype = getattr(torch, params.scale_dtype)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (as it will be stored, float32) and zero point (integers in float32) that cover ``[low, high]`` and 0."""
        if self.symmetric:
            scale = torch.maximum(low.abs(), high.abs()) * (2 / self.levels)
            scale = self._stored(scale)
            return scale, torch.full_like(scale, self.middle)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = self._stored((high - low) / self.levels)
        return scale, (-low / scale).round_().clamp_(0, self.levels)

    def _stored(self, scale: Tensor) -> Tensor:
        return least_scale(scale, self.scale_dtype).to(self.scale_dtype).to(torch.float32)

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes (integers in float32) nearest to ``values``; ties go to the even code."""
        return (values / scale).round_().add_(zero).clamp_(0, self.levels)

    def reconstruct(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``values`` as the grid of ``[low, high]`` gives them back."""
        scale, zero = self.parameters(low, high)
        return self.encode(values, scale, zero).sub_(zero).mul_(scale)


class IntegerEncoder(Encoder):
    """Rounds onto an integer grid; group scales may be fitted just before their group is rounded."""

    def __init__(self, codec: IntegerCodec, weight: Tensor, whole: Tensor, refit: bool) -> None:
        self.codec, self.grid = codec, codec.grid
        rows, columns = weight.shape
        self.group = codec.group_width(columns)
        groups = -(-columns // self.group)
        # Transposed, so that one column of the weight is one contiguous row.
        self.codes = weight.new_zeros(columns, rows, dtype=torch.uint8)
        self.scale = weight.new_zeros(groups, rows)
        self.zero = weight.new_zeros(groups, rows)
        if codec.params.granularity == "tensor":
            scale, zero = self._observe(_flat(whole))
            self.scale[:], self.zero[:] = scale.item(), zero.item()
        elif refit and codec.params.granularity == "group":
            self.refit_width = self.group
        else:
            for first in range(0, columns, self.group):
                self._fit(first // self.group, weight[:, first : first + self.group])

    def _fit(self, group: int, values: Tensor, importance: Tensor | None = None) -> None:
        scale, zero = self._observe(values, importance)
        self.scale[group], self.zero[group] = scale[:, 0], zero[:, 0]

    def _observe(self, values: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = self.codec.observer.observe(values, self.grid.reconstruct, importance)
        scale, zero = self.grid.parameters(low, high)
        if not bool((scale * self.grid.levels).isfinite().all()):
            raise UserError(
                f"weights up to {float(values.abs().max()):.3g} are too large for scales in scale_dtype "
                f"{self.codec.params.scale_dtype}. Check the checkpoint; bfloat16 and float32 hold larger scales"
            )
        return scale, zero

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:
        self._fit(first_column // self.group, values.T.contiguous(), importance)

    def round(self, first: int, values: Tensor) -> Tensor:
        group = first // self.group
        scale, zero = self.scale[group], self.zero[group]
        codes = self.grid.encode(values, scale, zero)
        self.codes[first] = codes[0]
        return codes.sub_(zero).mul_(scale)

    def round_all(self, weight: Tensor) -> Tensor:
        if self.refit_width:
            for first in range(0, weight.shape[1], self.group):
                self._fit(first // self.group, weight[:, first : first + self.group])
        wide = self.codec.spread(self.scale.T, weight.shape[1]), self.codec.spread(self.zero.T, weight.shape[1])
        codes = self.grid.encode(weight, *wide)
        self.codes = codes.T.to(torch.uint8)
        return codes.sub_(wide[1]).mul_(wide[0])

    def parts(self) -> Parts:
        codec = self.codec
        codes = self.codes.T
        scale, zero = self.scale.T, self.zero.T
        if codec.params.granularity == "tensor":
            scale, zero = scale[:1], zero[:1]
        parts = {"codes": codec.pack_codes(codes), "scale": scale.to(self.grid.scale_dtype).contiguous()}
        if not codec.params.symmetric:
            packed = bits.pack(zero.T.to(torch.uint8), codec.params.bits)
            parts["zero_point"] = packed.T.contiguous()
        return parts


@CODECS.add("integer")
class IntegerCodec(Codec):
    """Uniform integers; see the module's page for what is stored."""

    Parameters = ScaledParameters

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.params, ScaledParameters)
        self.params = scheme.params
        self.grid = Grid(self.params)
        self.observer: Observer = OBSERVERS.get(self.params.observer)()

    def describe(self) -> Described:
        params = self.params
        return Described(f"group {params.group_size}" if params.group_size else params.granularity, params.bits)

    @property
    def scale_dtype_name(self) -> str:
        return self.params.scale_dtype

    @property
    def has_one_scale(self) -> bool:
        return self.params.granularity == "tensor"

    @property
    def _bytes(self) -> bool:
        return self.params.bits == 8 and self.params.symmetric

    def group_width(self, columns: int) -> int:
        """Inputs of a row that share a scale."""
        return min(self.params.group_size or columns, columns)

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> IntegerEncoder:
        return IntegerEncoder(self, weight, whole, refit)

    def ideal_scales(self, weight: Tensor) -> Tensor:
        if self.params.granularity == "tensor":
            weight = weight.reshape(1, -1)
        width, (rows, columns) = self.group_width(weight.shape[1]), weight.shape
        whole = columns // width * width
        parts = [weight[:, :whole].reshape(rows, -1, width)]
        if whole < columns:
            parts.append(weight[:, None, whole:])
        low, high = (torch.cat(ends, dim=1) for ends in zip(*(part.aminmax(dim=-1) for part in parts), strict=True))
        if self.params.symmetric:
            return torch.maximum(low.abs(), high.abs()) * (2 / self.grid.levels)
        return (high.clamp(min=0) - low.clamp(max=0)) / self.grid.levels

    def join(self, slabs: list[Parts]) -> Parts:
        joined = super().join(slabs)
        if self.params.granularity == "tensor":
            joined |= {name: slabs[0][name] for name in ("scale", "zero_point") if name in joined}
        return joined

    def pack_codes(self, codes: Tensor) -> Tensor:
        """The stored form of uint8 codes ``(rows, columns)``."""
        return (codes.to(torch.int16) - 128).to(torch.int8) if self._bytes else bits.pack(codes, self.params.bits)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        width = self.params.bits
        groups = -(-columns // self.group_width(columns))
        scale_rows = 1 if self.params.granularity == "tensor" else rows
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows, columns), torch.int8)
            if self._bytes
            else ((rows, bits.words_per_row(columns, width)), torch.int32),
            "scale": ((scale_rows, groups), self.grid.scale_dtype),
        }
        if not self.params.symmetric:
            shapes["zero_point"] = ((bits.words_per_row(scale_rows, width), groups), torch.int32)
        return shapes

    def code_bits(self) -> dict[str, int]:
        return {"codes": self.params.bits}

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None, columns: int) -> Tensor:
        """(code - zero point) x scale, float32 ``(rows, columns)``, of the stored ``codes`` of some rows."""
        # Signed bytes are codes minus the middle already.
        values = codes.float() if self._bytes else bits.unpack(codes, self.params.bits, columns).float()
        width = self.group_width(columns)
        whole = columns // width * width
        for start, stop, size in ((0, whole, width), (whole, columns, columns - whole)):
            if size == 0:
                continue
            groups = slice(start // width, -(-stop // width))
            part = values[:, start:stop].view(len(values), (stop - start) // size, size)
            if not self._bytes:
                part.sub_(self.grid.middle if zero is None else zero[:, groups, None])
            part.mul_(scale[:, groups, None].float())
        return values

    def _zero(self, parts: Parts) -> Tensor | None:
        """Zero points uint8 ``(scale rows, groups)`` of an asymmetric grid."""
        if self.params.symmetric:
            return None
        return bits.unpack(parts["zero_point"].T, self.params.bits, parts["scale"].shape[0]).T

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """Per-group values ``(rows, groups)`` repeated for every column: ``(rows, columns)``, or broadcastable to it."""
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.group_width(columns), dim=1)[:, :columns]

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self._values(parts["codes"], parts["scale"], self._zero(parts), shape[1])

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        scale, zero = parts["scale"], self._zero(parts)
        if self.params.granularity != "tensor":
            scale = scale[rows]
            zero = None if zero is None else zero[rows]
        return self._values(parts["codes"][rows], scale, zero, shape[1])


def _flat(whole: Tensor) -> Tensor:
    return whole.to(torch.float32).reshape(1, -1)
