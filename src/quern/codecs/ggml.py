"""The block types of ggml, which a GGUF file holds as they are: ``{codec: ggml, type: q4_k}``.

What each stores is on the pages of ``blocks/``: ``plain`` for blocks of 32 weights with float16 scales, ``super`` for
blocks of 256 with scales of two storeys, ``vectors`` for those of which several weights together are a point of a
grid. Scales are fitted here, to what error feedback has made of a block's columns, each counting as much as an error
in it costs; what stands for a weight is decided by the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quern.codecs.base import CODECS, Codec, Described, Encoder, KernelForm, Parts
from quern.codecs.blocks.types import INSTEAD, TYPES, TypeName
from quern.codecs.integer import FINE
from quern.codecs.packing.ggml import GgmlBlocks, GgmlForm
from quern.codecs.packing.ggml_super import BLOCK
from quern.core.scheme import CodecParameters, CodecScheme
from quern.core.stacking import NO_TRAITS, Traits


class GgmlParameters(CodecParameters):
    """Nothing but the type."""

    type: TypeName = "q4_0"


@CODECS.add("ggml")
class GgmlCodec(Codec):
    """One of ggml's block types; see the module's page for what is stored."""

    Parameters = GgmlParameters
    technique = "uniform, blocks of ggml"

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.params, GgmlParameters)
        self.type = scheme.params.type
        self.inner = TYPES[self.type]()
        self.slab_rows = self.inner.slab_rows

    @property
    def traits(self) -> Traits:
        if self.inner.describe().bits >= FINE:
            return NO_TRAITS
        return Traits(wants={"even columns": "all columns of a block are rounded under one scale"})

    def describe(self) -> Described:
        return self.inner.describe()

    def fitting(self, shape: tuple[int, int]) -> CodecScheme:
        usable = self.type not in INSTEAD or shape[1] % BLOCK == 0
        return self.scheme if usable else self.scheme.with_params(type=INSTEAD[self.type])

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> Encoder:
        return self.inner.encoder(weight, whole, refit)

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        return self.inner.kernel(shape)

    def integers(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self.inner.integers(shape, parts)

    def fold(self, parts: Parts, factors: Tensor) -> Parts | None:
        return self.inner.fold(parts, factors)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.inner.part_shapes(shape)

    def code_bits(self) -> dict[str, int]:
        return self.inner.code_bits()

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        return self.inner.decode(shape, parts)

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        return self.inner.decode_rows(shape, parts, rows)

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        return self.inner.ggml(shape)

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        return self.inner.ggml_blocks(shape, parts)
