"""NF4: sixteen values at which a normal distribution is cut into equal parts (Dettmers et al. 2023, QLoRA, arXiv
2305.14314, section 3).

The values are rounded to multiples of 1/127 of the largest, which moves none by more than .004 and lets int8 arithmetic
multiply them.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated, Literal

from pydantic import Field

from quern.codecs.base import CODECS, ScaledParameters
from quern.codecs.levels import LevelsCodec

OFFSET = (1 - 1 / 30 + 1 - 1 / 32) / 2
"""The quantile of the largest value: the mean of those of fifteen and sixteen equal parts."""


def normal_float(bits: int = 4) -> tuple[float, ...]:
    """The 2^bits values from -1 to 1, ascending: 2^(bits-1) - 1 negative ones, zero, and 2^(bits-1) others."""
    half = 1 << bits - 1
    quantile = NormalDist().inv_cdf
    positive = [quantile(OFFSET + (0.5 - OFFSET) * i / half) for i in range(half)]
    negative = [-quantile(OFFSET + (0.5 - OFFSET) * i / (half - 1)) for i in range(half - 1)]
    largest = positive[0]
    return tuple(value / largest for value in (*negative, 0.0, *reversed(positive)))


class Nf4Parameters(ScaledParameters):
    """Four bits; a symmetric range."""

    bits: Literal[4] = 4
    symmetric: Literal[True] = True
    group_size: Annotated[int, Field(ge=1)] | None = 64


@CODECS.add("nf4")
class Nf4Codec(LevelsCodec):
    """NF4 codes times scales."""

    Parameters = Nf4Parameters
    technique = "non-uniform: quantiles"
    levels = tuple(round(127 * value) for value in normal_float())
