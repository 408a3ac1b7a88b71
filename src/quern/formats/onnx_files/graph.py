"""An ONNX model under construction: nodes, inputs and outputs, and tensors, of which large ones lie in a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from quern.formats.onnx_files import wire

OPSET, CONTRIB = 23, "com.microsoft"
IR_VERSION = 11
ALIGNMENT = 64
"""Bytes that offsets in the file of tensors are a multiple of."""
TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}
"""``TensorProto.DataType``."""
_FLOAT, _INT, _INTS, _EXTERNAL = 1, 2, 7, 1
Attribute = int | float | Sequence[int]
Dimension = int | str


class Graph:
    """Collects a model. ``file`` gets the large tensors, one behind the other; ``location`` is its name."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location, self._offset = file, location, 0
        self._nodes: list[bytes] = []
        self._tensors: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._constants: dict[tuple[torch.dtype, tuple[int, ...], bytes], str] = {}
        self._values: dict[tuple[object, ...], str] = {}
        self._names: set[str] = set()
        self._shared: dict[tuple[torch.dtype, tuple[int, ...], bytes], str] = {}

    def node(
        self, operator: str, inputs: Sequence[str], name: str, *, domain: str = "", **attributes: Attribute
    ) -> str:
        """Append a node with one output; the output's name. ``""`` among the inputs: one that is left out.

        A node that would compute what an earlier one does is not made: its output is that of the other.
        """
        said = tuple(
            (key, value if isinstance(value, int | float) else tuple(value)) for key, value in attributes.items()
        )
        key = (operator, domain, tuple(inputs), said)
        if key not in self._values:
            output = f"{name}/{operator}"
            assert output not in self._names, output
            self._names.add(output)
            self.nodes(operator, inputs, [output], domain=domain, **attributes)
            self._values[key] = output
        return self._values[key]

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Attribute
    ) -> None:
        """Append a node with outputs of these names."""
        self._nodes.append(
            wire.every(1, inputs)
            + wire.every(2, outputs)
            + wire.data(3, f"{outputs[0]}_node")
            + wire.data(4, operator)
            + wire.every(5, [_attribute(key, value) for key, value in attributes.items()])
            + (wire.data(7, domain) if domain else b"")
        )

    def constant(self, tensor: Tensor) -> str:
        """A small tensor that lies in the model itself; equal ones lie there once."""
        raw = bytes(_bytes(tensor))
        key = (tensor.dtype, tuple(tensor.shape), raw)
        if key not in self._constants:
            self._constants[key] = name = f"constant.{len(self._constants)}"
            self._tensors.append(_tensor(name, tensor) + wire.data(9, raw))
        return self._constants[key]

    def integers(self, values: Sequence[int]) -> str:
        """int64 ``(count,)``, as shapes and axes are given."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def stored(self, name: str, tensor: Tensor) -> str:
        """A tensor that lies in the file beside the model; its name."""
        self._file.write(bytes(-self._offset % ALIGNMENT))
        self._offset += -self._offset % ALIGNMENT
        self._file.write(_bytes(tensor))
        place = {"location": self._location, "offset": str(self._offset), "length": str(tensor.nbytes)}
        self._tensors.append(_tensor(name, tensor) + wire.pairs(13, place) + wire.number(14, _EXTERNAL))
        self._offset += tensor.nbytes
        return name

    def shared(self, name: str, tensor: Tensor) -> str:
        """A stored tensor; the name of an equal one where that lies in the file already, so that what is computed of both
        is computed once. For tensors of few bytes, which are remembered."""
        key = (tensor.dtype, tuple(tensor.shape), bytes(_bytes(tensor)))
        if key not in self._shared:
            self._shared[key] = self.stored(name, tensor)
        return self._shared[key]

    def as_float(self, name: str, dtype: torch.dtype) -> str:
        """A stored tensor in float32. Runtimes compute it once, when they load the model."""
        if dtype == torch.float32:
            return name
        return self.node("Cast", [name], name, to=TYPES[torch.float32])

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[Dimension]) -> str:
        """Declare an input; its name."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: torch.dtype, shape: Sequence[Dimension]) -> None:
        """Declare an output."""
        self._outputs.append(_value(name, dtype, shape))

    def model(self, producer: str, version: str, metadata: dict[str, str]) -> bytes:
        """The whole ``ModelProto``."""
        graph = (
            wire.every(1, self._nodes)
            + wire.data(2, "decoder")
            + wire.every(5, self._tensors)
            + wire.every(11, self._inputs)
            + wire.every(12, self._outputs)
        )
        opsets = [wire.data(1, "") + wire.number(2, OPSET), wire.data(1, CONTRIB) + wire.number(2, 1)]
        return (
            wire.number(1, IR_VERSION)
            + wire.data(2, producer)
            + wire.data(3, version)
            + wire.data(7, graph)
            + wire.every(8, opsets)
            + wire.pairs(14, metadata)
        )


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied where they lie in order."""
    whole = tensor.detach().cpu().contiguous()
    # A dimension of 1 may have any stride, which view() to another dtype would not take.
    flat = whole.as_strided((whole.numel(),), (1,), whole.storage_offset())
    return flat.view(torch.uint8).numpy().data


def _tensor(name: str, tensor: Tensor) -> bytes:
    """What a ``TensorProto`` says besides its values."""
    dimensions = b"".join(wire.number(1, size) for size in tensor.shape)
    return dimensions + wire.number(2, TYPES[tensor.dtype]) + wire.data(8, name)


def _value(name: str, dtype: torch.dtype, shape: Sequence[Dimension]) -> bytes:
    sizes = [wire.data(2, size) if isinstance(size, str) else wire.number(1, size) for size in shape]
    tensor = wire.number(1, TYPES[dtype]) + wire.data(2, wire.every(1, sizes))
    return wire.data(1, name) + wire.data(2, wire.data(1, tensor))


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, int):
        return wire.data(1, name) + wire.number(3, value) + wire.number(20, _INT)
    if isinstance(value, float):
        return wire.data(1, name) + wire.real(2, value) + wire.number(20, _FLOAT)
    return wire.data(1, name) + b"".join(wire.number(8, one) for one in value) + wire.number(20, _INTS)
