"""Latent weights behind a trellis: their codes are found anew from time to time, because each is a search over a whole
stream. In between values stay and gradients go straight through, so that latent weights gather what is asked of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quern.codecs.trainable.base import Trainable, straight_through

if TYPE_CHECKING:
    from quern.codecs.base import Parts
    from quern.codecs.trellis import TrellisCodec


class TrellisTrainable(Trainable):
    """Latent weights that begin at the stored values, and the logarithms of factors of rows. Tables stay."""

    def __init__(self, codec: TrellisCodec, shape: tuple[int, int], parts: Parts) -> None:
        super().__init__()
        self.codec, self.shape, self._table = codec, shape, parts["table"]
        self._scale = parts["scale"].float()
        self._numbers = codec.integers(shape, parts)
        unit = self._scale / codec.table.unit * (4 / (1 << codec.params.bits))
        self._unit = torch.where(unit > 0, unit, 1.0)
        self.codes: Tensor
        self.register_buffer("codes", parts["codes"])
        self.factor = nn.Parameter(torch.zeros(shape[0], 1))
        self.latent = nn.Parameter(codec.decode(shape, parts) / self._unit)

    def load_state_dict(self, *given: Any, **named: Any) -> Any:
        result = super().load_state_dict(*given, **named)
        self._look_up()
        return result

    def _look_up(self) -> None:
        self._numbers = self.codec.integers(self.shape, {"codes": self.codes, "table": self._table})

    def _scales(self) -> Tensor:
        scaled = self._scale * self.factor.exp()
        return straight_through(scaled, self.codec.nearest_scale(scaled.detach()))

    def values(self) -> Tensor:
        values = self._numbers.float() * self._scales()
        latent = self.latent * self._unit
        return values + straight_through(latent, torch.zeros_like(latent))

    @torch.no_grad()
    def parts(self) -> Parts:
        scale = self._scales().to(self.codec.scale_dtype)
        return {"codes": self.codes, "scale": scale, "table": self._table}

    @torch.no_grad()
    def encode_again(self) -> None:
        encoder = self.codec.encoder_at(self._scales()[:, 0].contiguous(), self.shape[1])
        encoder.round_all(self.latent * self._unit)
        self.codes = encoder.parts()["codes"]
        self._look_up()
