"""Linears and embeddings in ONNX: which tensors hold a weight, and which nodes compute with it.

- Codes in front of inputs as they are: ``MatMulNBits``, and ``GatherBlockQuantized`` for an embedding.
- Int8 codes in front of int8 inputs: ``MatMulInteger`` with the arithmetic of quern's engines; weights are bytes plus 128,
  which are multiplied exactly on every processor (bytes with signs saturate on x86 processors without VNNI).
- Rotated inputs: signs, and Sylvester's matrix of 2^k as the Kronecker product of two small ones, a product for each.
- What is not quantized: ``MatMul`` and ``Gather`` with the stored values in float32.

Scales and unquantized weights keep their stored dtype in the file; a ``Cast``, and where several blocks share a scale a
``Gather``, of them alone makes what the operators take. Runtimes compute such nodes once, when they load a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quern.codecs.base import ScaledParameters, codec_of
from quern.codecs.packing.nbits import NBitsForm
from quern.core.packed import PackedLinear
from quern.core.plan import LinearPlan
from quern.formats.onnx_files.graph import CONTRIB, TYPES, Graph
from quern.rotation.rotation import block_size, hadamard, unpack_signs

STEPS = 127.5
"""Of the int8 grid to either side: what the greatest input of a token becomes (``engines/_modules.py``)."""
TINY = float(torch.finfo(torch.float32).tiny)
MIDDLE = 128
"""What is added to int8 codes."""
Held = Mapping[str, Tensor]
Names = dict[str, str]


def problems(plan: LinearPlan, shape: tuple[int, int], embedding: bool) -> Iterator[str]:
    """Clauses that say why a matrix of ``shape`` cannot be stored by ``plan``."""
    form = codec_of(plan.scheme).nbits(shape)
    if isinstance(form, str):
        yield form
        return
    if embedding and shape[1] % form.block:
        yield f"rows of an embedding are cut into whole blocks, and {shape[1]} weights are no multiple of 16"
    if plan.activations.mode == "none":
        return
    if isinstance(plan.scheme.params, ScaledParameters) and plan.scheme.params.group_size is not None:
        yield (
            "weights in front of int8 activations have one scale a row or matrix in it; use granularity channel, or leave "
            "activations away: ONNX Runtime rounds the inputs of groups to int8 by itself"
        )
    if plan.activations.group_size is not None:
        yield "its int8 activations have one scale a token or matrix, none by group; leave granularity of activations away"


def held(module: str, linear: PackedLinear) -> dict[str, Tensor]:
    """The tensors, by full name, that hold a quantized weight in the files."""
    weight, codec = linear.weight, codec_of(linear.weight.scheme)
    found: dict[str, Tensor | None] = {}
    if linear.activations == "none":
        blocks = codec.nbits_blocks(weight.shape, weight.parts)
        found = {"codes": blocks.codes, "scale": blocks.scale, "zero_point": blocks.zero}
    else:
        codes, scale, _ = codec.int8_codes(weight.shape, weight.parts)
        moved = (codes.to(torch.int16) + MIDDLE).to(torch.uint8)
        dtype = codec.scale_dtype_name  # of which they are numbers
        kept = scale if dtype is None else scale.to(getattr(torch, dtype))
        found = {"codes": moved.T.contiguous(), "scale": kept.reshape(-1)}
        if linear.input_scale is not None:
            found["input_scale"] = torch.tensor(linear.input_scale, dtype=torch.float32)
    if linear.input_signs is not None:
        found["input_signs"] = unpack_signs(linear.input_signs, weight.shape[1]).to(torch.int8)
    return {f"{module}.{name}": tensor.contiguous() for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class Products:
    """Makes the nodes of one model. ``accuracy_level``: that of ``MatMulNBits``, 1 for inputs as they are, 4 for int8."""

    graph: Graph
    accuracy_level: int

    def store(self, module: str, tensors: Held) -> Names:
        """Put what holds ``module`` into the files; the names of its tensors and of those made of them, by part."""
        found = {}
        for name, tensor in tensors.items():
            if name.rpartition(".")[0] == module:
                part = name.rpartition(".")[2]
                store = self.graph.shared if part == "input_signs" else self.graph.stored
                found[part] = store(name, tensor)
                if part in ("weight", "scale", "bias", "input_signs"):
                    found[part] = self.graph.as_float(found[part], tensor.dtype)
        return found

    def linear(self, module: str, shape: tuple[int, int], plan: LinearPlan, names: Names, inputs: str) -> str:
        """``inputs (..., columns) -> (..., rows)``."""
        if plan.rotation is not None:
            inputs = self._rotated(module, shape[1], names["input_signs"], inputs)
        if not plan.quantized:
            found = self.graph.node("FusedMatMul", [inputs, names["weight"]], module, domain=CONTRIB, transB=1)
        elif plan.activations.mode == "none":
            found = self._by_blocks(module, shape, plan, names, inputs)
        else:
            found = self._by_bytes(module, plan, names, inputs)
        return self.graph.node("Add", [found, names["bias"]], module) if "bias" in names else found

    def embedding(self, module: str, shape: tuple[int, int], plan: LinearPlan, names: Names, ids: str) -> str:
        """``ids (...) -> (..., columns)``."""
        if not plan.quantized:
            return self.graph.node("Gather", [names["weight"], ids], module, axis=0)
        form, scale = self._form(plan, shape), self._scales(module, shape, plan, names)
        table = self.graph.node("Reshape", [names["codes"], self.graph.integers([shape[0], -1])], module)
        inputs = [table, ids, scale, *([names["zero_point"]] if "zero_point" in names else [])]
        layout = {"gather_axis": 0, "quantize_axis": 1, "block_size": form.block, "bits": form.bits}
        return self.graph.node("GatherBlockQuantized", inputs, module, domain=CONTRIB, **layout)

    def _by_blocks(self, module: str, shape: tuple[int, int], plan: LinearPlan, names: Names, inputs: str) -> str:
        form, scale = self._form(plan, shape), self._scales(module, shape, plan, names)
        operands = [inputs, names["codes"], scale, *([names["zero_point"]] if "zero_point" in names else [])]
        sizes = {"N": shape[0], "K": shape[1], "bits": form.bits, "block_size": form.block}
        return self.graph.node(
            "MatMulNBits", operands, module, domain=CONTRIB, **sizes, accuracy_level=self.accuracy_level
        )

    def _form(self, plan: LinearPlan, shape: tuple[int, int]) -> NBitsForm:
        form = codec_of(plan.scheme).nbits(shape)
        assert not isinstance(form, str), form
        return form

    def _scales(self, module: str, shape: tuple[int, int], plan: LinearPlan, names: Names) -> str:
        """Float32 ``(rows, blocks)`` of the stored scales ``(rows or 1, groups)``."""
        scale, groups = names["scale"], self._form(plan, shape).groups
        if groups != tuple(range(len(groups))):
            scale = self.graph.node("Gather", [scale, self.graph.integers(groups)], f"{module}.scale", axis=1)
        if codec_of(plan.scheme).has_one_scale:
            scale = self.graph.node("Expand", [scale, self.graph.integers([shape[0], len(groups)])], f"{module}.scale")
        return scale

    def _by_bytes(self, module: str, plan: LinearPlan, names: Names, inputs: str) -> str:
        """int8 x int8 -> int32, exact; the scales of token and row come in afterwards, one after the other."""
        graph = self.graph
        if plan.activations.mode == "dynamic":
            sizes = graph.node("Abs", [inputs], inputs)
            largest = graph.node("ReduceMax", [sizes, graph.integers([-1])], inputs, keepdims=1)
            steps, least = graph.constant(torch.tensor(STEPS)), graph.constant(torch.tensor(TINY))
            scale = graph.node("Max", [graph.node("Div", [largest, steps], f"{inputs}.scale"), least], inputs)
        else:
            scale = names["input_scale"]
        place = f"{inputs} by {scale}"
        rounded = graph.node("Round", [graph.node("Div", [inputs, scale], place)], place)
        ends = [graph.constant(torch.tensor(end)) for end in (-128.0, 127.0)]
        quantized = graph.node("Cast", [graph.node("Clip", [rounded, *ends], place)], place, to=TYPES[torch.int8])
        zero = graph.constant(torch.tensor(MIDDLE, dtype=torch.uint8))
        product = graph.node("MatMulInteger", [quantized, names["codes"], "", zero], module)
        product = graph.node("Cast", [product], module, to=TYPES[torch.float32])
        product = graph.node("Mul", [product, scale], f"{module}.token")
        return graph.node("Mul", [product, names["scale"]], f"{module}.row")

    def _rotated(self, module: str, columns: int, signs: str, inputs: str) -> str:
        """``quern.rotation``: every column times its sign, then Sylvester's matrix over blocks of columns."""
        graph, size = self.graph, block_size(columns)
        turned = graph.node("Mul", [inputs, signs], f"{module}.rotation")
        if size == 1:
            return turned
        width = 1 << (size.bit_length() - 1) // 2
        height = size // width
        shape = graph.integers([0, 0, columns // size, height, width])
        blocks = graph.node("Reshape", [turned, shape], f"{module}.rotation")
        # H (height x width) = H (height) x H (width), so the blocks as matrices are multiplied from both sides.
        rows = graph.node("MatMul", [self._sylvester(height), blocks], f"{module}.rotation.rows")
        both = graph.node("MatMul", [rows, self._sylvester(width)], f"{module}.rotation.columns")
        return graph.node("Reshape", [both, graph.integers([0, 0, columns])], f"{module}.rotation.end")

    def _sylvester(self, size: int) -> str:
        return self.graph.constant(hadamard(torch.eye(size)))
