"""Four columns to a code: the nearest of a matrix's own vectors, times the row's scale (dropped into codecs/)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from quern.codecs.base import CODECS, Codec, Described, Encoder, Parts
from quern.core.scheme import CodecParameters, CodecScheme

TOGETHER, SAMPLED = 4, 4096


class VectorParameters(CodecParameters):
    """How the vectors are chosen."""

    entries: Annotated[int, Field(ge=1, le=256)] = 256
    """Vectors of a matrix."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Of Lloyd's algorithm."""


class VectorEncoder(Encoder):
    """Looks the nearest vector up."""

    width = TOGETHER

    def __init__(self, weight: Tensor, vectors: Tensor) -> None:
        self.vectors, self.scale = vectors, scales(weight)
        self.codes = torch.zeros(weight.shape[0], -(-weight.shape[1] // TOGETHER), dtype=torch.uint8)

    def round(self, first: int, values: Tensor) -> Tensor:
        count = len(values)
        points = (values / self.scale).T
        code = torch.cdist(points, self.vectors[:, :count]).argmin(1)
        self.codes[:, first // TOGETHER] = code.to(torch.uint8)
        return self.vectors[code, :count].T * self.scale

    def parts(self) -> Parts:
        return {
            "codes": self.codes,
            "scale": self.scale.to(torch.float16)[:, None],
            "vectors": self.vectors.to(torch.float16),
        }


@CODECS.add("vector")
class VectorCodec(Codec):
    """8 / 4 = 2 bits a weight with 256 vectors."""

    Parameters = VectorParameters

    def __init__(self, scheme: CodecScheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.params, VectorParameters)
        self.params = scheme.params

    def describe(self) -> Described:
        return Described("channel", 8 / TOGETHER)

    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> VectorEncoder:
        whole = whole.float()
        columns = whole.shape[1] // TOGETHER * TOGETHER
        points = (whole / scales(whole)[:, None])[:, :columns].reshape(-1, TOGETHER)
        points = points[:: -(-len(points) // SAMPLED)]
        vectors = points[torch.linspace(0, len(points) - 1, self.params.entries).long()].clone()
        for _ in range(self.params.steps):
            nearest = torch.cdist(points, vectors).argmin(1)
            count = torch.bincount(nearest, minlength=len(vectors))[:, None]
            vectors = torch.where(count > 0, torch.zeros_like(vectors).index_add_(0, nearest, points) / count, vectors)
        return VectorEncoder(weight, vectors.to(torch.float16).float())

    def join(self, slabs: list[Parts]) -> Parts:
        return super().join(slabs) | {"vectors": slabs[0]["vectors"]}

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        return {
            "codes": ((rows, -(-columns // TOGETHER)), torch.uint8),
            "scale": ((rows, 1), torch.float16),
            "vectors": ((self.params.entries, TOGETHER), torch.float16),
        }

    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        values = parts["vectors"].float()[parts["codes"].int()].reshape(shape[0], -1)[:, : shape[1]]
        return values * parts["scale"].float()


def scales(weight: Tensor) -> Tensor:
    """The root mean square of each row as float16 stores it, float32 ``(rows,)``."""
    return weight.float().square().mean(1).sqrt().clamp(min=2**-14).to(torch.float16).float()
