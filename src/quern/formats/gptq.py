"""GPTQ's layout, as AutoGPTQ and GPTQModel write it and vLLM and transformers load it (docs/gptq-awq.md).

For a linear of ``in`` inputs and ``out`` outputs, in groups of ``group_size`` inputs:

- ``qweight``: int32 ``(in * bits / 32, out)``, unsigned codes along the inputs, lowest bits first, at 3 bits across words.
- ``qzeros``: int32 ``(groups, out * bits / 32)``, zero points packed alike along the outputs.
- ``scales``: float16 ``(groups, out)``.
- ``g_idx``: int32 ``(in,)``, the group of each input: they follow each other.

The weight is (code - zero) * scale. These are quern's ``integer`` codes, transposed. ``checkpoint_format`` ``gptq`` stores
each zero point less one, so that there is none of 0; ``gptq_v2`` stores it as it is. Symmetric weights, whose zero points
are all 2^(bits-1), are written in the former, which every reader has; others in the latter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import quern
from quern.checkpoint.checkpoint import Checkpoint
from quern.codecs.base import ScaledParameters
from quern.codecs.packing import bits
from quern.core.errors import UserError
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

METHOD = "gptq"
LESS_ONE, AS_IT_IS = "gptq", "gptq_v2"
"""Values of ``checkpoint_format``: what becomes of zero points."""
FORM = "checkpoint-format"
"""The option that names one of them."""
VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)
"""What vLLM 0.32 loads (``vllm/model_executor/layers/quantization/auto_gptq.py`` and ``utils/marlin_utils.py``)."""
SETTINGS = "quantize_config.json"
"""A file that repeats ``quantization_config``, for AutoGPTQ."""


class GptqWriter(PackedIntegersWriter):
    """2, 3, 4 and 8 bits."""

    allowed_bits = (2, 3, 4, 8)
    rows_multiple = columns_multiple = 32

    def __init__(self, recipe: Recipe, plan: Any, architecture: Any) -> None:
        super().__init__(recipe, plan, architecture)
        self._form: str | None = None

    def setting(self, params: ScaledParameters) -> str:
        return f"{params.bits} bits, {_grid(params)}, {_sharing(params)}"

    def prepare(self, checkpoint: Checkpoint, options: Mapping[str, str]) -> None:
        if unknown := sorted(set(options) - {FORM}):
            raise UserError(f"format gptq has no option {unknown[0]!r}; it has: {FORM}")
        self._form = options.get(FORM)
        if self._form not in (None, LESS_ONE, AS_IT_IS):
            raise UserError(f"format gptq has no {FORM} {self._form!r}; it has: {LESS_ONE}, {AS_IT_IS}")

    def _form_of(self, params: ScaledParameters) -> str:
        return self._form or (LESS_ONE if params.symmetric else AS_IT_IS)

    def tensors(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        params, (_, columns) = linear.weight.scheme.params, linear.weight.shape
        assert isinstance(params, ScaledParameters)
        zeros = zero_points(params, linear)
        if self._form_of(params) == LESS_ONE:
            if not bool(zeros.all()):
                raise UserError(
                    f"zero points of {module} are 0, and {FORM} {LESS_ONE} stores each less one. Leave the option out: "
                    f"asymmetric weights are then stored as {AS_IT_IS}"
                )
            zeros = zeros - 1
        group = params.group_size or columns
        return {
            "qweight": packed_codes(params, linear.weight.parts["codes"]).T.contiguous(),
            "qzeros": bits.pack(zeros, params.bits),
            "scales": half_scales(module, linear.weight.parts["scale"]),
            "g_idx": (torch.arange(columns) // group).to(torch.int32),
        }

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        params = self.common(plan)
        kept: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in self.kept(plan)}
        return {
            "quant_method": METHOD,
            "bits": params.bits,
            "group_size": params.group_size or PER_CHANNEL,
            "desc_act": False,
            "sym": params.symmetric,
            "lm_head": False,
            "checkpoint_format": self._form_of(params),
            "pack_dtype": "int32",
            **({"dynamic": kept} if kept else {}),
            "meta": {"quantizer": [f"quern:{quern.__version__}"]},
        }

    def further_files(self, plan: Plan) -> dict[str, Any]:
        return {SETTINGS: self.quantization_config(plan)}


def _grid(params: ScaledParameters) -> str:
    return "symmetric" if params.symmetric else "asymmetric"


def _sharing(params: ScaledParameters) -> str:
    return "by channel" if params.group_size is None else f"groups of {params.group_size}"


@FORMATS.add("gptq")
class Gptq(Format):
    """AutoGPTQ's and GPTQModel's. Quern opens it as what its codes stand for."""

    method = METHOD
    opened_as_values = True
    runtimes: ClassVar[tuple[Target, ...]] = ("vllm", "transformers", "quern")
    joins = True
    writer = GptqWriter

    @classmethod
    def obstacles(cls, recipe: Recipe) -> Iterator[Obstacle]:
        yield Obstacle(
            "transformers", gettext("loads it only where the packages gptqmodel and optimum are installed beside it")
        )
        for params in (scheme.params for scheme in (recipe.weights, *(o.scheme for o in recipe.overrides)) if scheme):
            if not isinstance(params, ScaledParameters):
                continue
            if params.bits not in VLLM_BITS or not params.symmetric:
                yield Obstacle(
                    "vllm",
                    gettext(
                        "loads symmetric GPTQ weights of 4 and 8 bits, and these are {grid} of {bits}",
                        grid=_grid(params),
                        bits=params.bits,
                    ),
                )
            if params.granularity == "group" and params.group_size not in VLLM_GROUPS:
                sizes = ", ".join(map(str, VLLM_GROUPS))
                yield Obstacle(
                    "vllm",
                    gettext(
                        "has kernels for GPTQ's groups of {sizes} and for channels, not of {group_size}",
                        sizes=sizes,
                        group_size=params.group_size,
                    ),
                )
