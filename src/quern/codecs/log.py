"""Powers of two: a sign and an exponent, so that a shift multiplies (Miyashita et al. 2016, arXiv 1603.01025).

A code of b bits has its sign above an exponent e of b - 1 bits, which stands for 2^-e times the scale; the greatest exponent
stands for zero. Of five bits the values reach down to 2^-14. Of two bits they are -1, 0 and 1 times the scale: ternary
weights (Li et al. 2016, arXiv 1605.04711), which multiply nothing, and of which an entropy coder leaves 1.58 bits or less.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from quern.codecs.base import CODECS, KernelForm, Parts, ScaledParameters
from quern.codecs.levels import LevelsCodec
from quern.codecs.packing.planes import unpack
from quern.core.scheme import CodecScheme

LOOKED_UP = (2, 3, 4)
"""Bits of codes whose values fit a byte."""


def powers(bits: int) -> tuple[int, ...]:
    """The values by code, as multiples of the least of them."""
    half = 1 << bits - 1
    sizes = [1 << half - 2 - exponent for exponent in range(half - 1)] + [0]
    return (*sizes, *(-size for size in sizes))


class LogParameters(ScaledParameters):
    """Two to five bits; a symmetric range."""

    bits: Annotated[int, Field(ge=2, le=5)] = 4
    symmetric: Literal[True] = True


@CODECS.add("log")
class LogCodec(LevelsCodec):
    """Signed powers of two times scales."""

    Parameters = LogParameters
    technique = "non-uniform: logarithmic"

    def __init__(self, scheme: CodecScheme) -> None:
        assert isinstance(scheme.params, LogParameters)
        self.levels = powers(scheme.params.bits)
        super().__init__(scheme)

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        if self.params.bits in LOOKED_UP:
            return super().kernel(shape)
        # Powers of two are numbers of E5M2 as well, at a byte each. Its least one above zero is 2^-16.
        options = {"scale_type": self.params.scale_dtype, "scale_factor": self.grid.largest}
        return self.kernel_form("float8_e5m2", shape, options, decoded=True, exact_inputs=True)

    def integers(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        """The values over the largest one as E5M2 numbers, int8 ``(rows, columns)``."""
        codes = unpack(parts["codes"], self.params.bits, shape[1]).long()
        table = (self.grid.values / self.grid.largest).to(torch.float8_e5m2).view(torch.int8)
        return table[codes]
