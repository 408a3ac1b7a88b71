"""Round to nearest: every weight on its own."""

from __future__ import annotations

from torch import Tensor

from quern.codecs.base import Codec
from quern.quantization.rounding.base import ROUNDINGS, RoundedSlab, Rounding
from quern.quantization.rounding.factor import Factor


@ROUNDINGS.add("nearest")
class Nearest(Rounding):
    """The nearest value of the codec; needs no calibration."""

    needs_hessian = False

    def round_slab(
        self, slab: Tensor, whole: Tensor, codec: Codec, factor: Factor | None, native: bool = False
    ) -> RoundedSlab:
        encoder = codec.encoder(slab, whole, refit=False)
        decoded = encoder.round_all(slab)
        error = float((slab - decoded).double().square_().sum())
        return RoundedSlab(encoder.parts(), decoded, error, float(slab.double().square_().sum()))
