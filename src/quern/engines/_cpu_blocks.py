"""The blocks of a GGUF file as the native kernels read them: nothing is dequantized.

Super-blocks are read where they lie. Blocks of 32 are taken apart when the model is loaded, into the parts that codec
``ggml`` has for them. Rows of q and k that llama.cpp has in another order are copied into transformers'.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quern.checkpoint.gguf.file import GgufSource
from quern.checkpoint.gguf.names import restore_row_order
from quern.codecs.base import CODECS, Codec, KernelForm, codec_of
from quern.codecs.packing.ggml import BLOCK, HALF
from quern.core.scheme import parse_scheme

_ROWS_AT_ONCE = 1 << 22
"""Bytes of blocks that are taken apart at a time."""


class GgufBlocks:
    """The matrices of a GGUF file by the names of their modules."""

    def __init__(self, source: GgufSource) -> None:
        self._source = source
        self._taken_apart: dict[str, dict[str, NDArray[np.uint8]]] = {}
        self._without: dict[str, str] = {}

    def form(self, module: str, shape: tuple[int, int]) -> KernelForm | None:
        """How kernels read the matrix of ``module``; None where it is no blocks, or there are no kernels for them."""
        name = f"{module}.weight"
        kind = self._source.block_type(name) if name in self._source.stored else None
        codec = None if kind is None else _codec(kind)
        form = None if codec is None else codec.kernel(shape)
        if kind is not None and not isinstance(form, KernelForm):
            self._without[module] = kind
            return None
        return form if isinstance(form, KernelForm) else None

    def arrays(
        self, module: str, shape: tuple[int, int], form: KernelForm, stored: NDArray[np.uint8]
    ) -> dict[str, NDArray[np.uint8]]:
        """Keywords of ``_native.Matrix`` for ``form``. ``stored``: the bytes of the tensor."""
        heads = self._source.heads.get(f"{module}.weight")
        if form.blocks and heads is None:
            return {"codes": stored}
        if module not in self._taken_apart:  # an embedding that is the head too is asked for twice
            rows = stored.reshape(shape[0], -1)
            if heads is not None:
                rows = rows[restore_row_order(torch.arange(shape[0]), heads).numpy()]
            found = {"codes": rows} if form.blocks else _apart(form.kind, self._kind(module), rows)
            self._taken_apart[module] = {key: array.reshape(-1).view(np.uint8) for key, array in found.items()}
        return self._taken_apart[module]

    def _kind(self, module: str) -> str:
        kind = self._source.block_type(f"{module}.weight")
        assert kind is not None
        return kind

    def notes(self) -> list[str]:
        """What should be known of matrices that there are no kernels for."""
        return [
            f"the cpu engine has no kernel for {kind.upper()}: {count} matrices were dequantized to float32, which takes "
            "more memory and time"
            for kind, count in sorted(Counter(self._without.values()).items())
        ]


def _codec(kind: str) -> Codec | None:
    """The codec that stores what blocks of ``kind`` hold; None where there is none."""
    try:
        return codec_of(parse_scheme({"codec": "ggml", "type": kind})) if "ggml" in CODECS.names() else None
    except ValueError:
        return None


def _apart(packing: str, kind: str, rows: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Codes and float16 scales of blocks of 32: ``rows`` uint8 ``(rows, bytes)``; codes as kind ``packing`` wants them."""
    step = max(1, _ROWS_AT_ONCE // rows.shape[1])
    parts = [_blocks_apart(packing, kind, rows[first : first + step]) for first in range(0, len(rows), step)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _blocks_apart(packing: str, kind: str, rows: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    bytes_of = {"q4_0": 18, "iq4_nl": 18, "q5_0": 22, "q8_0": 34}[kind]
    blocks = rows.reshape(len(rows), -1, bytes_of)
    scale = np.ascontiguousarray(blocks[..., :2])
    if kind == "q8_0":
        return {"codes": np.ascontiguousarray(blocks[..., 2:]), "scale": scale}
    nibbles = blocks[..., -HALF:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    if kind == "q5_0":
        fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
        codes = (codes | fifth << 4).view(np.int8) - np.int8(BLOCK // 2)
        assert packing == "integer8"
        return {"codes": codes, "scale": scale}
    assert packing in ("integer4", "codebook4")
    return {"codes": codes[..., ::2] | codes[..., 1::2] << 4, "scale": scale}
