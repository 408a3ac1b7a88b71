"""Trained tables: the values of k-means codebooks move along the sum of the gradients of the weights that have them (Han et
al. 2016, Deep Compression, arXiv 1510.00149, section 3.3); latent weights, where there are any, choose among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quern.codecs.packing import planes
from quern.codecs.trainable.base import Trainable, straight_through

if TYPE_CHECKING:
    from quern.codecs.base import Parts
    from quern.codecs.kmeans import KMeansCodec


class TableTrainable(Trainable):
    """Tables and the logarithms of factors of their scales; with ``weight`` latent weights too."""

    def __init__(self, codec: KMeansCodec, shape: tuple[int, int], parts: Parts, weight: Tensor | None) -> None:
        super().__init__()
        self.codec, self.shape, self.width = codec, shape, codec.group_width(shape[1])
        self._scale, size = parts["scale"].float(), 1 << codec.params.bits
        self._table = parts["table"].float().view(*self._scale.shape, size)
        self._codes = planes.unpack(parts["codes"], codec.params.bits, shape[1])
        self.table = nn.Parameter(torch.zeros_like(self._table))
        self.factor = nn.Parameter(torch.zeros_like(self._scale))
        self.latent: nn.Parameter | None = None
        if weight is not None:
            span = (self._table[..., -1] - self._table[..., 0]) * self._scale / (size - 1)
            self._unit = torch.where(span > 0, span, 1.0)
            self.latent = nn.Parameter(self._begin(weight))

    def _begin(self, weight: Tensor) -> Tensor:
        """``weight`` where it rounds to what is stored, else what is stored, in steps."""
        unit = self._wide(self._unit)
        with torch.no_grad():
            decoded = self._looked_up(self._table, self._scale, self._codes)
            found = self._looked_up(
                self._table, self._scale, self._nearest(self._table, self._scale, weight / unit * unit)
            )
            return torch.where(found == decoded, weight, decoded) / unit

    def _wide(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.width, dim=1)[:, : self.shape[1]]

    def _nearest(self, table: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        codes = []
        for group, part in enumerate(torch.split(weight, self.width, dim=1)):
            values = table[:, group].expand(len(part), -1)
            limits = (values[:, 1:] + values[:, :-1]) / 2
            codes.append(torch.searchsorted(limits.contiguous(), (part / scale[:, group, None]).contiguous()))
        return torch.cat(codes, dim=1).to(torch.uint8)

    def _looked_up(self, table: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
        parts = []
        for group, part in enumerate(torch.split(codes.long(), self.width, dim=1)):
            parts.append(table[:, group].expand(len(part), -1).gather(1, part) * scale[:, group, None])
        return torch.cat(parts, dim=1)

    def _now(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tables in ascending order, scales, and the codes of all weights."""
        scaled = self._scale * self.factor.exp()
        scale = straight_through(scaled, self.codec.nearest_scale(scaled.detach()))
        moved = self._table + self.codec.LARGEST * self.table
        stored = moved.detach().round().clamp(-self.codec.LARGEST, self.codec.LARGEST)
        table, order = straight_through(moved, stored).sort(dim=-1, stable=True)
        if self.latent is not None:
            weight = self.latent.detach() * self._wide(self._unit)
            return table, scale, self._nearest(table.detach(), scale.detach(), weight)
        ranks = order.argsort(dim=-1)
        codes = [
            ranks[:, group].expand(len(part), -1).gather(1, part)
            for group, part in enumerate(torch.split(self._codes.long(), self.width, dim=1))
        ]
        return table, scale, torch.cat(codes, dim=1).to(torch.uint8)

    def values(self) -> Tensor:
        values = self._looked_up(*self._now())
        if self.latent is None:
            return values
        latent = self.latent * self._wide(self._unit)
        return values + straight_through(latent, torch.zeros_like(latent))

    @torch.no_grad()
    def parts(self) -> Parts:
        table, scale, codes = self._now()
        return {
            "codes": planes.pack(codes.contiguous(), self.codec.params.bits),
            "scale": scale.to(self.codec.scale_dtype).contiguous(),
            "table": table.flatten(0, 1).to(torch.int8).contiguous(),
        }
