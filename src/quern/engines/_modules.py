"""Modules that hold packed weights and unpack them when they run: the reference for every faster engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quern.codecs.base import Codec, codec_of
from quern.core.machine import products
from quern.core.packed import ActivationMode
from quern.core.scheme import CodecScheme
from quern.rotation.rotation import rotate

LARGEST, LEAST = 127, -128


class PackedWeight(nn.Module):
    """A codec's parts as buffers, under the names that quern's format stores them by."""

    def __init__(self, scheme: CodecScheme, shape: tuple[int, int]) -> None:
        super().__init__()
        self.codec: Codec = codec_of(scheme)
        self.shape = shape
        self._part_names: list[str] = []
        for name, (size, dtype) in self.codec.part_shapes(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype))
            self._part_names.append(name)

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors."""
        return {name: getattr(self, name) for name in self._part_names}

    def stored_bytes(self) -> int:
        """Bytes of the packed weight and of what goes with it."""
        return sum(part.nbytes for part in self.parts().values())

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight's values ``(rows, columns)``."""
        return self.codec.decode(self.shape, self.parts()).to(dtype)

    def _apply(self, function: Any, recurse: bool = True) -> PackedWeight:
        """Moves between devices, but never changes the dtype of codes and scales, as ``model.to(dtype)`` would."""
        before = dict(self._buffers)
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        for name, part in before.items():
            moved = self._buffers[name]
            if part is not None and moved is not None and moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self


class QuantizedLinear(PackedWeight):
    """``inputs (..., columns) -> (..., rows)`` with packed weights and, where asked, rotated inputs and int8 activations."""

    def __init__(
        self,
        scheme: CodecScheme,
        shape: tuple[int, int],
        bias: bool,
        dtype: torch.dtype,
        activations: ActivationMode,
        rotated: bool = False,
        input_group: int | None = None,
    ) -> None:
        super().__init__(scheme, shape)
        self.out_features, self.in_features = shape
        self.activations, self.input_group = activations, input_group
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None
        if activations == "static":
            self.input_scale: Tensor
            self.register_buffer("input_scale", torch.empty((), dtype=torch.float32))
        self.rotated = rotated
        if rotated:
            self.input_signs: Tensor
            self.register_buffer("input_signs", torch.empty(-(-shape[1] // 8), dtype=torch.uint8))

    def stored_bytes(self) -> int:
        return super().stored_bytes() + (self.input_signs.nbytes if self.rotated else 0)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.rotated:
            inputs = rotate(inputs, self.input_signs).to(inputs.dtype)
        if self.activations == "none":
            return products.linear(inputs, self.decoded(inputs.dtype), self.bias)
        output = self._integer_product(inputs.reshape(-1, self.in_features)).to(inputs.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*inputs.shape[:-1], self.out_features)

    def _integer_product(self, rows: Tensor) -> Tensor:
        """int8 x int8 -> int32, exact; the scales of token and channel come in afterwards, in float32.

        Where inputs or weights have scales by groups of columns, there is such a product of each group, and these are added
        in order, in float32.
        """
        codes, weight_scales, width = self.codec.int8_codes(self.shape, self.parts())
        size = min(self.input_group or width, width)  # of both, where both have groups
        whole = None if self.input_group else self._input_scale(rows)
        total: Tensor | None = None
        for group, start in enumerate(range(0, self.in_features, size)):
            columns = slice(start, start + size)
            scale = dynamic_scale(rows[:, columns]) if whole is None else whole
            quantized = (rows[:, columns].float() / scale).round_().clamp_(LEAST, LARGEST).to(torch.int8)
            product = torch._int_mm(quantized, codes[:, columns].T)
            part = product.float().mul_(scale).mul_(weight_scales[:, group if width < self.in_features else 0])
            total = part if total is None else total.add_(part)
        assert total is not None, "a linear has inputs"
        return total

    def _input_scale(self, rows: Tensor) -> Tensor:
        """One scale a token, float32 ``(tokens, 1)``."""
        return self.input_scale.expand(len(rows), 1) if self.activations == "static" else dynamic_scale(rows)


def dynamic_scale(rows: Tensor) -> Tensor:
    """One scale a token, float32 ``(tokens, 1)``: the greatest |x| lies at the end of the int8 grid."""
    largest = rows.float().abs().amax(-1, keepdim=True)
    # Divided, not multiplied by the inverse: the greatest |x| lands on a tie, where the last bit of the scale decides.
    return (largest / ((LARGEST - LEAST) / 2)).clamp(min=torch.finfo(torch.float32).tiny)


class QuantizedEmbedding(PackedWeight):
    """``ids (...) -> (..., columns)``; decodes the rows that are asked for."""

    def __init__(self, scheme: CodecScheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(scheme, shape)
        self.num_embeddings, self.embedding_dim = shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows, index = torch.unique(ids, return_inverse=True)
        table = self.codec.decode_rows(self.shape, self.parts(), rows)
        return table.to(self.dtype)[index]


class TiedHead(nn.Module):
    """An output head that reads the packed embedding."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is not registered (and stored) twice

    @property
    def weight(self) -> Tensor:
        """The head's values; transformers asks for them by this name."""
        return self._embedding[0].decoded(self._embedding[0].dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return products.linear(hidden, self._embedding[0].decoded(hidden.dtype))
