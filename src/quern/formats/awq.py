"""AWQ's layout of version GEMM, as AutoAWQ writes it and vLLM and transformers load it (docs/gptq-awq.md).

For a linear of ``in`` inputs and ``out`` outputs, in groups of ``group_size`` inputs:

- ``qweight``: int32 ``(in, out / 8)``; a word holds the codes of eight outputs, in the order ``ORDER`` from its lowest bits.
- ``qzeros``: int32 ``(groups, out / 8)``, zero points in the same order.
- ``scales``: float16 ``(groups, out)``.

The weight is (code - zero) * scale. Symmetric weights have the zero point 8 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from quern.checkpoint.foreign.awq import BITS, FIELDS, ORDER
from quern.codecs.base import ScaledParameters
from quern.codecs.packing import bits
from quern.core.packed import PackedLinear
from quern.core.plan import Plan
from quern.core.recipe import Recipe
from quern.core.results import Target
from quern.core.text.language import gettext
from quern.formats.base import FORMATS, Format, Obstacle
from quern.formats.writing.packed_integers import (
    PER_CHANNEL,
    PackedIntegersWriter,
    half_scales,
    packed_codes,
    zero_points,
)

METHOD = "awq"


class AwqWriter(PackedIntegersWriter):
    """4 bits."""

    allowed_bits = (BITS,)
    rows_multiple = FIELDS

    def setting(self, params: ScaledParameters) -> str:
        return "by channel" if params.group_size is None else f"groups of {params.group_size}"

    def tensors(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        params, (_, columns) = linear.weight.scheme.params, linear.weight.shape
        assert isinstance(params, ScaledParameters)
        codes = bits.unpack(packed_codes(params, linear.weight.parts["codes"]), BITS, columns)
        return {
            "qweight": _words(codes.T),
            "qzeros": _words(zero_points(params, linear)),
            "scales": half_scales(module, linear.weight.parts["scale"]),
        }

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        kept = self.kept(plan)
        return {
            "quant_method": METHOD,
            "bits": BITS,
            "group_size": self.common(plan).group_size or PER_CHANNEL,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept or None,
        }


def _words(codes: Tensor) -> Tensor:
    """uint8 codes below 16 ``(n, out)`` as int32 ``(n, out / 8)``."""
    return bits.pack(codes.reshape(len(codes), -1, FIELDS)[..., list(ORDER)].flatten(1), BITS)


@FORMATS.add("awq")
class Awq(Format):
    """AutoAWQ's. Quern opens it as what its codes stand for."""

    method = METHOD
    opened_as_values = True
    runtimes: ClassVar[tuple[Target, ...]] = ("vllm", "transformers", "quern")
    joins = True
    activations_dtype = "float16"
    writer = AwqWriter

    @classmethod
    def obstacles(cls, recipe: Recipe) -> Iterator[Obstacle]:
        yield Obstacle("transformers", gettext("loads it only where the package gptqmodel is installed beside it"))
