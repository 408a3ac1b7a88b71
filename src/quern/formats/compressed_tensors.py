"""compressed-tensors (vLLM's format): W4A16 and its like as ``pack-quantized``, W8A8 and W4A8 as ``int-quantized``.

Field names and layouts follow compressed-tensors 0.20. Its packed integers are quern's ``integer`` codes as they are: the
signed value plus 2^(bits-1), dense in 32-bit words along the row, zero points down the rows. Scales keep the recipe's
``scale_dtype``, or the wider one that a module got; vLLM turns them into the model's own dtype when it loads.
``int-quantized`` weights are signed bytes, whatever their bits.

A Hadamard rotation of inputs becomes a ``transform_config`` of type ``hadamard`` (Sylvester's matrix, as ours), a scheme for
each block size. Random signs have no place in it: type ``random-hadamard`` stores one dense matrix for all linears of a
width, where each of our groups has signs of its own, and its readers multiply by that matrix instead of n log n additions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from quern.codecs.base import ScaledParameters, codec_of
from quern.codecs.packing import bits
from quern.codecs.packing.floats import FloatForm
from quern.core.packed import ActivationMode, PackedLinear
from quern.core.plan import LinearPlan, Plan
from quern.core.recipe import Recipe
from quern.core.recipe_parts import Activations
from quern.core.results import Target
from quern.core.scheme import CodecScheme
from quern.core.text.language import gettext
from quern.formats.base import FORMATS, Format, Obstacle
from quern.formats.compressed_tensors_reader import METHOD, CompressedTensorsReader
from quern.formats.sharded import ShardedWriter
from quern.formats.writing.compressed_config import activation_arguments, integer_arguments, rotations
from quern.formats.writing.refusals import cannot_store, misnamed, torn

_VLLM_BITS = (4, 8)
INTEGER = "integer"
"""The codec whose codes lie packed or as signed bytes; those of others are floating-point numbers (``Codec.floats``)."""
_Kind = tuple[CodecScheme, ActivationMode]
"""What the modules of one config group have in common."""


class CompressedTensorsWriter(ShardedWriter):
    """Integer weights of 2 to 8 bits per channel or group; int8 activations per token or tensor."""

    def check(self) -> None:
        super().check()
        problems: dict[str, list[str]] = {}
        if self.recipe.random_signs:
            problems["its Hadamard rotation has no random signs; set random_signs: false in transform hadamard"] = []
        for module, plan in self.plan.quantized().items():
            for problem in self._problems(module, plan):
                problems.setdefault(problem, []).append(module)
        if any(block.sources for block in self.architecture.blocks):
            problems["it stores experts one by one, which transformers' classes of this family do not read"] = []
        for problem in (*torn(self.architecture, self.plan, _alike), *misnamed(self.architecture)):
            problems[problem] = []
        linears = {m: p for m, p in self.plan.quantized().items() if m != self.architecture.embedding}
        scaled = [p.scheme.params for p in linears.values() if isinstance(p.scheme.params, ScaledParameters)]
        alike = {(str(p.scheme), p.activations.mode) for p in linears.values()}
        if len(alike) > 1 and not all(params.symmetric for params in scaled):
            problems["asymmetric weights need one scheme for all, because transformers decompresses all by one"] = []
        if problems:
            raise cannot_store("compressed-tensors", self.recipe.name, problems)

    def _problems(self, module: str, plan: LinearPlan) -> Iterator[str]:
        """Everything about ``module`` that the format, or vLLM with it, cannot say."""
        params = plan.scheme.params
        if plan.scheme.codec != INTEGER and isinstance(form := codec_of(plan.scheme).floats(), str):
            yield form
        if module == self.architecture.embedding:
            yield "vLLM reads no quantized embedding; set embedding: {codec: none}"
            return
        if not isinstance(params, ScaledParameters):
            return
        columns = self._shape(module)[1]
        if params.group_size is not None and columns % params.group_size:
            yield f"the rows have {columns} inputs, which is not a multiple of the group size {params.group_size}"
        if params.bits < 2:
            yield "1-bit integers are not part of it"
        if params.granularity == "block" and plan.scheme.codec == INTEGER:
            yield "vLLM and transformers read no blocks of integers; use granularity channel or group"
        if plan.activations.mode == "none" and params.granularity == "tensor" and plan.scheme.codec == INTEGER:
            yield "weight-only quantization per tensor is not part of it; use granularity channel or group"
        if plan.activations.mode != "none":
            yield from _input_problems(params, plan.activations)

    def encode(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        assert linear.input_signs is None or not bool(linear.input_signs.any())  # check() refuses random signs
        params, parts = linear.weight.scheme.params, linear.weight.parts
        if linear.weight.scheme.codec != INTEGER:
            floats = codec_of(linear.weight.scheme).float_tensors(linear.weight.shape, parts)
            return {f"{module}.{name}": tensor for name, tensor in floats.items()}
        assert isinstance(params, ScaledParameters)
        tensors = {"weight_scale": parts["scale"]}
        if params.granularity == "tensor":
            tensors["weight_scale"] = parts["scale"].reshape(1)
        if linear.activations != "none":
            tensors["weight"] = codec_of(linear.weight.scheme).int8_codes(linear.weight.shape, parts)[0]
        else:
            tensors["weight_packed"] = _packed(parts["codes"])
            tensors["weight_shape"] = torch.tensor(linear.weight.shape, dtype=torch.int64)
        if not params.symmetric:
            tensors["weight_zero_point"] = parts["zero_point"]
        if linear.input_scale is not None:
            tensors["input_scale"] = torch.tensor([linear.input_scale], dtype=torch.float32)
        return {f"{module}.{name}": tensor for name, tensor in tensors.items()}

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        alike = _kinds(plan)
        scaled = [scheme.params for scheme, _ in alike if isinstance(scheme.params, ScaledParameters)]
        dtypes = {params.scale_dtype for params in scaled}
        unsaid = not all(params.symmetric for params in scaled) and len(dtypes) > 1
        if unsaid:  # transformers decompresses asymmetric weights by one scheme for all, with scales as they are stored
            alike = _kinds(plan, scale_dtype="float32")
        groups, formats = {}, set()
        for position, ((scheme, mode), modules) in enumerate(alike.items()):
            name, arguments = _stored_as(scheme, mode)
            formats.add(name)
            groups[f"group_{position}"] = {
                "targets": modules,
                "weights": arguments | ({"scale_dtype": None} if unsaid else {}),
                "input_activations": activation_arguments(mode),
                "output_activations": None,
                "format": name,
            }
        kept = [
            name for name in (*self.architecture.linears, self.architecture.head) if not self._quantized(plan, name)
        ]
        config: dict[str, Any] = {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted([*kept, *self.architecture.never_quantized]),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        rotated = {name: self._shape(name)[1] for name, p in sorted(plan.quantized().items()) if p.rotation is not None}
        if self.recipe.rotated:
            config["transform_config"] = {"config_groups": rotations(rotated)}
        return config

    def _shape(self, module: str) -> tuple[int, ...]:
        return self.architecture.module_shapes()[f"{module}.weight"]

    def _quantized(self, plan: Plan, name: str) -> bool:
        return name in plan and plan[name].quantized

    def notes(self) -> list[str]:
        found = [f"{obstacle.target} {obstacle.reason}" for obstacle in CompressedTensors.obstacles(self.recipe)]
        narrow = {
            p.scheme.params.bits
            for p in self.plan.quantized().values()
            if _narrow(p.scheme, p.activations) and isinstance(p.scheme.params, ScaledParameters)
        }
        if narrow:
            found.append(
                f"weights of {' and '.join(map(str, sorted(narrow)))} bits in front of int8 activations take a byte each: "
                "the format has no packed form of them; format quern has"
            )
        shapes = self.architecture.module_shapes()
        biased = [m for m, plan in self.plan.quantized().items() if plan.rotation is not None and f"{m}.bias" in shapes]
        if biased:
            names = sorted({module.rpartition(".")[2] for module in biased})
            found.append(
                f"vllm refuses this artifact: it rotates no inputs of linears with a bias, and {', '.join(names)} of this "
                "model have one; leave the rotation away, or keep them out of it by overrides of codec none"
            )
        return found


@FORMATS.add("compressed-tensors")
class CompressedTensors(Format):
    """vLLM's. Tried with transformers 5.24 and compressed-tensors 0.20.1 without quern, and with vLLM 0.32 on a CPU; what
    needs a GPU was read in vLLM's source (docs/compressed-tensors.md)."""

    method = METHOD
    extra = "compressed-tensors"
    runtimes: ClassVar[tuple[Target, ...]] = ("vllm", "transformers", "quern")
    joins = True
    writer = CompressedTensorsWriter
    reader = CompressedTensorsReader

    @classmethod
    def obstacles(cls, recipe: Recipe) -> Iterator[Obstacle]:
        overriding = [override.scheme for override in recipe.overrides]
        schemes = [s.params for s in (recipe.weights, *overriding, recipe.head) if s is not None and s.quantized]
        scaled = [params for params in schemes if isinstance(params, ScaledParameters)]
        if any(_joins_scales(scheme) for scheme in (recipe.weights, *overriding) if scheme is not None):
            yield Obstacle(
                "vllm",
                gettext(
                    "takes one scale of the whole matrix for linears that it joins (q, k, v; gate, up), and each has "
                    "its own"
                ),
            )
        if any(_is_fp4(scheme) for scheme in (recipe.weights, *overriding, recipe.head) if scheme is not None):
            yield Obstacle(
                "transformers",
                gettext(
                    "runs FP4 in other dtypes than bfloat16 only by from_pretrained(..., "
                    "quantization_config=CompressedTensorsConfig(dequantize=True))"
                ),
            )
        if any(not params.symmetric for params in scaled):
            yield Obstacle(
                "transformers",
                gettext(
                    "loads asymmetric weights only by from_pretrained(..., "
                    "quantization_config=CompressedTensorsConfig(dequantize=True)); symmetric ones it loads as they "
                    "are"
                ),
            )
        if recipe.rotated:
            yield Obstacle(
                "transformers",
                gettext(
                    "drops the rotation without a word and computes nonsense; docs/compressed-tensors.md has the "
                    "lines that add it"
                ),
            )
            yield Obstacle(
                "vllm",
                gettext(
                    "rotates inputs on one GPU only (read in its source, not tried), and none of a linear that has a "
                    "bias"
                ),
            )
        inside = [(recipe.weights, recipe.activations)]
        inside += [(o.scheme or recipe.weights, o.activations or recipe.activations) for o in recipe.overrides]
        if any(_narrow(scheme, activations) for scheme, activations in inside):
            yield Obstacle(
                "vllm",
                gettext(
                    "multiplies 4-bit weights by int8 activations on CPUs only, and no other width below 8 (of GPUs "
                    "read in its source, not tried)"
                ),
            )
        head = recipe.head.params
        packed = scaled if recipe.activations.mode == "none" else [head] if isinstance(head, ScaledParameters) else []
        odd = sorted({params.bits for params in packed} - {*_VLLM_BITS})
        if odd:
            yield Obstacle(
                "vllm",
                gettext(
                    "has kernels for packed weights of 4 and 8 bits, not of {widths}",
                    widths=" and ".join(map(str, odd)),
                ),
            )


def _joins_scales(scheme: CodecScheme) -> bool:
    """Whether matrices have a scale of their own that runtimes want in common."""
    form = codec_of(scheme).floats() if scheme.quantized else ""
    return not isinstance(form, str) and form.joined_scale


def _is_fp4(scheme: CodecScheme) -> bool:
    """Whether codes are floating-point numbers of 4 bits, which the package decompresses in bfloat16."""
    form = codec_of(scheme).floats() if scheme.quantized else ""
    return not isinstance(form, str) and form.bits == 4


def _narrow(scheme: CodecScheme, activations: Activations) -> bool:
    """Whether weights below 8 bits meet int8 activations."""
    return activations.mode != "none" and isinstance(scheme.params, ScaledParameters) and scheme.params.bits < 8


def _input_problems(params: ScaledParameters, activations: Activations) -> Iterator[str]:
    """What the schemes with int8 activations, W8A8 and W4A8, do not say."""
    if activations.group_size is not None:
        yield "its int8 activations have one scale a token or tensor, none by group; leave granularity of activations away"
    if params.bits == 8 and params.granularity == "group":
        yield "8-bit weights in front of int8 activations have no groups in it; use granularity channel or tensor"
    if params.bits < 8 and params.granularity == "tensor":
        yield "weights below 8 bits in front of int8 activations have scales by channel or group in it, not by tensor"
    if params.bits < 8 and activations.mode == "static":
        yield "weights below 8 bits go with dynamic int8 activations in it; set activations: {mode: dynamic}"


def _alike(plan: LinearPlan) -> tuple[object, ...]:
    return plan.scheme, plan.activations.mode, plan.rotation


def _kinds(plan: Plan, **changes: Any) -> dict[_Kind, list[str]]:
    """The modules of each scheme and mode of activations: the groups of the configuration."""
    alike: dict[_Kind, list[str]] = {}
    for module, chosen in sorted(plan.quantized().items()):
        scheme = chosen.scheme.with_params(**changes)
        alike.setdefault((scheme, chosen.activations.mode), []).append(module)
    return alike


def _packed(codes: Tensor) -> Tensor:
    if codes.dtype == torch.int8:  # quern keeps symmetric 8-bit codes as signed bytes
        return bits.pack((codes.to(torch.int16) + 128).to(torch.uint8), 8)
    return codes


def _form(scheme: CodecScheme) -> FloatForm:
    form = codec_of(scheme).floats()
    assert not isinstance(form, str)  # check() refuses the others
    return form


def _stored_as(scheme: CodecScheme, mode: ActivationMode) -> tuple[str, dict[str, Any]]:
    """The name of the compressed form, and what a config group says of weights."""
    if scheme.codec != INTEGER:
        return _form(scheme).format, _form(scheme).arguments()
    assert isinstance(scheme.params, ScaledParameters)
    return "pack-quantized" if mode == "none" else "int-quantized", integer_arguments(scheme.params)
