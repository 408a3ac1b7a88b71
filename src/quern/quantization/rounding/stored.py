"""What is stored already: every weight keeps the value that it has, as codes of the same grid."""

from __future__ import annotations

import torch
from torch import Tensor

from quern.codecs.base import Codec
from quern.core.errors import UserError
from quern.core.scheme import CodecScheme
from quern.quantization.rounding.base import ROUNDINGS, SLAB, RoundedSlab, Rounding
from quern.quantization.rounding.factor import Factor

LOOKED_AT = 32
"""Rows by which another scheme is looked for where the one that was asked for does not hold the values."""


@ROUNDINGS.add("stored")
class Stored(Rounding):
    """Takes over weights that are values of the codec, as those that another tool quantized may be. Nothing is rounded.

    Raises ``UserError`` for weights that are not.
    """

    needs_hessian = False
    keeps_values = True

    def slab_height(self, rows: int, codec: Codec) -> int:
        return rows if codec.has_one_scale else SLAB

    def round_slab(
        self, slab: Tensor, whole: Tensor, codec: Codec, factor: Factor | None, native: bool = False
    ) -> RoundedSlab:
        parts = codec.exact_parts(slab)
        if parts is None:
            raise UserError(_refusal(codec, codec.exact_scheme(slab[:LOOKED_AT])))
        return RoundedSlab(parts, slab, 0.0, float(torch.linalg.vector_norm(slab, dtype=torch.float64)) ** 2)


def _refusal(codec: Codec, other: CodecScheme | None) -> str:
    problem = f"rounding stored: these weights are not values of {_said(codec.scheme)}"
    again = "rounding nearest or gptq takes any weights, and rounds them again"
    if other is not None:
        return f"{problem}, but the first of them are of {_said(other)}. Set that, if the source is so; {again}"
    return (
        f"{problem}, nor does another scheme of that codec with scales for channels or groups have them. quern inspect "
        "shows what a tool quantized, and how; if in groups of other than neighbouring inputs (GPTQ's desc_act), or if "
        f"merged or rescaled since, it cannot be taken over; {again}"
    )


def _said(scheme: CodecScheme) -> str:
    """The keys of a scheme that decide on its values, as a recipe has them."""
    keys = {key: value for key, value in scheme.to_json().items() if value is not None and key != "observer"}
    return "{" + ", ".join(f"{key}: {str(value).lower()}" for key, value in keys.items()) + "}"
