"""The first rows and columns of a quantized matrix, by its codes."""

from __future__ import annotations

import torch

from quern.codecs.base import codec_of
from quern.core.packed import QuantizedWeight


def cut(weight: QuantizedWeight, shape: tuple[int, int]) -> QuantizedWeight | None:
    """``weight`` without what lies behind the rows and columns of ``shape``; None where its codes do not part there.

    Most codecs store rows one after the other and groups along them, so the parts of the smaller matrix are the first of the
    larger one. Whether that is so is seen by decoding both.
    """
    codec = codec_of(weight.scheme)
    if codec.fitting(shape) != weight.scheme:
        return None
    parts = {}
    for name, (sizes, dtype) in codec.part_shapes(shape).items():
        part = weight.parts[name]
        if (
            part.dim() != len(sizes)
            or part.dtype != dtype
            or any(a < b for a, b in zip(part.shape, sizes, strict=True))
        ):
            return None
        parts[name] = part[tuple(slice(0, size) for size in sizes)].contiguous()
    whole = codec.decode(weight.shape, weight.parts)
    if not torch.equal(codec.decode(shape, parts), whole[: shape[0], : shape[1]]):
        return None
    return QuantizedWeight(weight.scheme, shape, parts)
