"""Codebooks that are fitted to the weights: k-means in one dimension (Lloyd 1982, doi:10.1109/TIT.1982.1056489; for weights
Han et al. 2016, Deep Compression, arXiv 1510.00149), each weight counting as much as an error in its column costs.

A tensor, each row or each group of a row has a table of its own: whole numbers that fit a byte, times a scale. Parts:

- ``codes``: int32, packed as ``planes`` says.
- ``scale``: ``scale_dtype`` ``(rows, groups)``, ``(rows, 1)`` or ``(1, 1)``: a 127th of the largest value of a table.
- ``table``: int8 ``(owners, 2^bits)`` in ascending order; owners are as many as there are scales, in their order.
"""

from __future__ import annotations

from threading import Lock
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

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
from quern.codecs.fitting.lloyd import fit_tables
from quern.codecs.packing import planes
from quern.codecs.trainable.base import Trainable
from quern.codecs.trainable.tables import TableTrainable
from quern.core.scheme import CodecScheme

LARGEST = 127
MOST_VALUES = 1 << 21
"""Of a whole tensor so many weights, evenly spaced, are looked at."""


class KMeansParameters(ScaledParameters):
    """Two to four bits; tables take any values, so that ranges are neither symmetric nor not."""

    bits: Annotated[int, Field(ge=2, le=4)] = 4
    symmetric: Literal[True] = True
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: Annotated[int, Field(ge=1)] | None = None


class KMeansEncoder(Encoder):
    """Rounds to the nearest value of a fitted table."""

    def __init__(self, codec: KMeansCodec, weight: Tensor, whole: Tensor, refit: bool) -> None:
        self.codec, self.whole = codec, whole
        rows, columns = weight.shape
        self.group, self.weight = codec.group_width(columns), weight
        groups, size = -(-columns // self.group), 1 << codec.params.bits
        self.codes = weight.new_zeros(columns, rows, dtype=torch.uint8)
        self.scale = weight.new_zeros(groups, rows)
        self.table = weight.new_zeros(groups, rows, size)
        self.importance: Tensor | None = None
        self.fitted = [False] * groups
        if refit and codec.params.granularity == "group":
            self.refit_width = self.group
        self.rescale_width = None if codec.has_one_scale else self.group

    def rescale(self, first_column: int, factor: Tensor) -> Tensor:
        scale, dtype = self.scale[first_column // self.group], self.codec.scale_dtype
        stored = least_scale(scale * factor, dtype).to(dtype).float()
        stored = torch.where((stored * LARGEST).isfinite(), stored, scale)
        ratio = stored / scale
        scale.copy_(stored)
        return ratio

    def weigh(self, importance: Tensor) -> None:
        self.importance = importance

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:
        self._fit(first_column // self.group, values.T, importance)

    def _fit_as_it_was(self, group: int) -> None:
        """Fit to the weights as they came, unless that was done."""
        if self.fitted[group]:
            return
        columns = slice(group * self.group, (group + 1) * self.group)
        self._fit(group, self.weight[:, columns], None if self.importance is None else self.importance[columns])

    def _fit(self, group: int, values: Tensor, importance: Tensor | None) -> None:
        if self.codec.params.granularity == "tensor":
            self.scale[0], self.table[0] = self.codec.whole_table(self.whole, importance)
        else:
            self.scale[group], self.table[group] = self.codec.stored_tables(values, importance)
        self.fitted[group] = True

    def round(self, first: int, values: Tensor) -> Tensor:
        group = first // self.group
        self._fit_as_it_was(group)
        codes, rounded = self._round(group, values.T)
        self.codes[first] = codes[:, 0]
        return rounded.T

    def round_all(self, weight: Tensor) -> Tensor:
        rounded = torch.empty_like(weight)
        for group in range(len(self.fitted)):
            self._fit_as_it_was(group)
            columns = slice(group * self.group, (group + 1) * self.group)
            codes, rounded[:, columns] = self._round(group, weight[:, columns])
            self.codes[columns] = codes.T
        return rounded

    def _round(self, group: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 and what they stand for, both ``(rows, columns)``; half-way it is the smaller value's."""
        scale, table = self.scale[group][:, None], self.table[group]
        limits = (table[:, 1:] + table[:, :-1]) / 2
        codes = torch.searchsorted(limits.contiguous(), (values / scale).contiguous())
        return codes.to(torch.uint8), table.gather(1, codes).mul_(scale)

    def parts(self) -> Parts:
        for group in range(len(self.fitted)):
            self._fit_as_it_was(group)
        scale, table = self.scale.T, self.table.transpose(0, 1)
        if self.codec.has_one_scale:
            scale, table = scale[:1], table[:1]
        return {
            "codes": planes.pack(self.codes.T.contiguous(), self.codec.params.bits),
            "scale": scale.to(self.codec.scale_dtype).contiguous(),
            "table": table.flatten(0, 1).to(torch.int8).contiguous(),
        }


@CODECS.add("kmeans")
class KMeansCodec(Codec):
    """Fitted codebooks; see the module's page for what is stored."""

    Parameters = KMeansParameters
    technique = "non-uniform: k-means"
    trains_codes = True
    LARGEST = LARGEST

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.params, KMeansParameters)
        self.params = scheme.params
        self.scale_dtype: torch.dtype = getattr(torch, self.params.scale_dtype)
        self._lock = Lock()
        self._whole: tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]] | None = None

    def describe(self) -> Described:
        size = self.params.group_size
        return Described(f"{self.params.granularity} {size}" if size else self.params.granularity, self.params.bits)

    @property
    def scale_dtype_name(self) -> str:
        return self.params.scale_dtype

    @property
    def has_one_scale(self) -> bool:
        return self.params.granularity == "tensor"

    def group_width(self, columns: int) -> int:
        """Inputs of a row that share a table."""
        return min(self.params.group_size or columns, columns)

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> KMeansEncoder:
        return KMeansEncoder(self, weight, whole, refit)

    def stored_tables(self, values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale ``(rows,)`` and table ``(rows, 2^bits)``, float32 as they will be stored, for ``values`` ``(rows, n)``."""
        fitted = fit_tables(values, importance, 1 << self.params.bits)
        ideal = (fitted.abs().amax(dim=1) / LARGEST).float()
        scale = least_scale(ideal, self.scale_dtype).to(self.scale_dtype).float()
        if not bool((scale * LARGEST).isfinite().all()):
            raise scales_overflow(values, self.params.scale_dtype)
        table = (fitted / scale[:, None].double()).round().clamp(-LARGEST, LARGEST).float()
        return scale, table

    def whole_table(self, whole: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same for all rows of ``whole``, the same for every slab of it."""
        with self._lock:
            known = self._whole
            if known is not None and known[0] is whole and _same(known[1], importance):
                return known[2]
            columns = whole.shape[1]
            step = max(1, whole.numel() // MOST_VALUES)
            places = torch.arange(0, whole.numel(), step, device=whole.device)
            values = whole.reshape(-1)[places].float()[None]
            found = self.stored_tables(values, None if importance is None else importance[places % columns])
            self._whole = whole, importance, found
            return found

    def nearest_scale(self, scale: Tensor) -> Tensor:
        """The scale next to float32 ``scale`` that can be stored."""
        return nearest_scale(scale, self.scale_dtype)

    def trainable(self, shape: tuple[int, int], parts: Parts, weight: Tensor | None) -> Trainable:
        return TableTrainable(self, shape, parts, weight)

    def ideal_scales(self, weight: Tensor) -> Tensor:
        if self.has_one_scale:
            weight = weight.reshape(1, -1)
        width = self.group_width(weight.shape[1])
        return torch.cat(
            [part.abs().amax(dim=1, keepdim=True) / LARGEST for part in torch.split(weight, width, dim=1)], dim=1
        )

    def join(self, slabs: list[Parts]) -> Parts:
        joined = super().join(slabs)
        if self.has_one_scale:
            joined |= {name: slabs[0][name] for name in ("scale", "table")}
        return joined

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        scale_rows, groups = 1 if self.has_one_scale else rows, -(-columns // self.group_width(columns))
        return {
            "codes": ((rows, planes.words_per_row(columns, self.params.bits)), torch.int32),
            "scale": ((scale_rows, groups), self.scale_dtype),
            "table": ((scale_rows * groups, 1 << self.params.bits), torch.int8),
        }

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        return KernelForm(
            f"codebook{self.params.bits}",
            {"codes": "codes", "scale": "scale", "table": "table"},
            {"scale_type": self.params.scale_dtype},
            self.group_width(shape[1]),
            0 if self.has_one_scale else 1,
        )

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self._decode(parts["codes"], parts, slice(None), shape[1])

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        return self._decode(parts["codes"][rows], parts, slice(None) if self.has_one_scale else rows, shape[1])

    def _decode(self, codes: Tensor, parts: Parts, owners: Tensor | slice, columns: int) -> Tensor:
        scale = parts["scale"][owners].float()
        table = parts["table"].view(len(parts["scale"]), scale.shape[1], -1)[owners].float()
        unpacked = planes.unpack(codes, self.params.bits, columns).long()
        width, decoded = self.group_width(columns), []
        for group, part in enumerate(torch.split(unpacked, width, dim=1)):
            values = table[:, group].expand(len(codes), -1).gather(1, part)
            decoded.append(values.mul_(scale[:, group, None]))
        return torch.cat(decoded, dim=1)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
