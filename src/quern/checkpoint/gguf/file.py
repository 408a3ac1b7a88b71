"""GGUF files as checkpoints: configuration, names and weights of the Llama, Mistral, Mixtral and Qwen families.

llama.cpp's converter (``convert_hf_to_gguf.py``) renames tensors and reorders the rows of Llama's q and k for its own
rotary embedding; both are undone here, and ``config.py`` makes a configuration of the metadata. Weights are
dequantized one tensor at a time, a few rows at a time, to float32 (float16 and bfloat16 stay as they are).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quern.checkpoint.files import InputFile
from quern.checkpoint.gguf.config import WINDOWED_LAYERS, config_of
from quern.checkpoint.gguf.header import MOST_TENSORS, GgufTensor
from quern.checkpoint.gguf.names import (
    FAMILIES,
    OTHER,
    ROPE_FREQUENCIES,
    ROUTERS,
    names_of_experts,
    reordered_heads,
    restore_row_order,
    transformers_name,
)
from quern.checkpoint.gguf.split import GgufParts, read_parts
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo, allocate_bytes
from quern.core.errors import BadFileError, UserError

_VALUES_AT_ONCE = 1 << 18
"""Numbers that are decoded at a time, which bounds what the decoders make on the way."""
F32 = 0
GGML_DTYPES = {F32: "F32", 1: "F16", 30: "BF16"}
"""Types of ggml that are dtypes of torch: read as they are stored."""
MOST_FREQUENCIES = 1 << 16

_KEPT = frozenset(family.architecture + WINDOWED_LAYERS for family in FAMILIES.values())


@dataclass(frozen=True)
class GgufSource:
    """The tensors of a GGUF, in one file or in several, under transformers' names."""

    weight_files: tuple[Path, ...]
    """The files; the first one holds the metadata."""
    places: Mapping[str, Path]
    stored: Mapping[str, GgufTensor]
    infos: Mapping[str, TensorInfo]
    heads: Mapping[str, int]
    """Tensors whose rows are reordered, with their number of heads."""

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.places[name]

    def plain(self, name: str) -> bool:
        """Whether a tensor's bytes in the file are its numbers in their order."""
        return name not in self.heads and GGML_DTYPES.get(self.stored[name].kind) is not None

    def block_type(self, name: str) -> str | None:
        """ggml's name of the type of blocks that a tensor is stored in, as ``q4_k``; None of dtypes of torch."""
        from gguf import GGMLQuantizationType

        kind = self.stored[name].kind
        return None if kind in GGML_DTYPES else GGMLQuantizationType(kind).name.lower()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantized, in fresh memory on the CPU."""
        tensor = _dequantized(self.places[name], self.stored[name], self.infos[name])
        return restore_row_order(tensor, self.heads[name]) if name in self.heads else tensor


def open_gguf(path: Path) -> tuple[dict[str, Any], GgufSource]:
    """The configuration (as ``config.json`` would say it) and the tensors of a GGUF file, or of all parts of a split one.

    Raises ``BadFileError`` for a malformed file, ``UserError`` for a model of another family.
    """
    parts = read_parts(path, _KEPT)
    first, header = parts.paths[0], parts.header
    config = config_of(first, header, _rotary_factors(parts))
    stored: dict[str, GgufTensor] = {}
    places: dict[str, Path] = {}
    for gguf_name, tensor in header.tensors.items():
        if gguf_name != ROPE_FREQUENCIES:
            named = _named(parts.places[gguf_name], gguf_name, tensor, config)
            stored |= named
            places |= dict.fromkeys(named, parts.places[gguf_name])
        if len(stored) > MOST_TENSORS:
            raise BadFileError(first, f"holds more than {MOST_TENSORS} matrices, counting those of experts", OTHER)
    infos = {
        name: TensorInfo(_read_dtype(places[name], name, tensor.kind), tensor.shape, tensor.begin, tensor.end)
        for name, tensor in stored.items()
    }
    return config, GgufSource(parts.paths, places, stored, infos, _reordered(first, config, infos))


def _named(path: Path, gguf_name: str, tensor: GgufTensor, config: Mapping[str, Any]) -> dict[str, GgufTensor]:
    """A tensor under transformers' name, or the matrices of a stack of experts, each of which lies in a piece."""
    around = names_of_experts(gguf_name)
    if around is None:
        name, shape = transformers_name(path, gguf_name), tensor.shape
        row = gguf_name.endswith(ROUTERS) and len(shape) == 1  # the gate of a shared expert is stored as a vector
        return {name: replace(tensor, shape=(1, *shape)) if row else tensor}
    family = FAMILIES[config["model_type"]]
    count = config[family.experts.count] if family.experts else 0
    if len(tensor.shape) != 3 or tensor.shape[0] != count:
        raise BadFileError(
            path, f"tensor {gguf_name!r} has shape {tensor.shape}; it must be a stack of {count} matrices", OTHER
        )
    size = (tensor.end - tensor.begin) // count
    begins = (tensor.begin + size * expert for expert in range(count))
    return {
        f"{around[0]}{expert}{around[1]}": GgufTensor(tensor.shape[1:], tensor.kind, begin, begin + size)
        for expert, begin in enumerate(begins)
    }


def _rotary_factors(parts: GgufParts) -> NDArray[np.float64] | None:
    """What the frequencies of the rotary embedding are divided by; None where the file does not say."""
    tensor = parts.header.tensors.get(ROPE_FREQUENCIES)
    if tensor is None:
        return None
    place = parts.places[ROPE_FREQUENCIES]
    if len(tensor.shape) != 1 or tensor.shape[0] > MOST_FREQUENCIES or tensor.kind != F32:
        raise BadFileError(place, f"{ROPE_FREQUENCIES} is no list of float32 numbers of a head's size", OTHER)
    info = TensorInfo("F32", tensor.shape, tensor.begin, tensor.end)
    return np.asarray(_dequantized(place, tensor, info).double().numpy())


def rounding_note(source: GgufSource) -> str | None:
    """What should be known of a file whose weights are rounded already; None where they are whole floats."""
    from gguf import GGMLQuantizationType

    kinds = {tensor.kind for tensor in source.stored.values()} - set(GGML_DTYPES)
    if not kinds:
        return None
    stored = sum(info.stored_bytes for info in source.infos.values())
    bits = 8 * stored / sum(info.elements for info in source.infos.values())
    names = ", ".join(sorted(GGMLQuantizationType(kind).name for kind in kinds))
    return (
        f"the weights in {source.weight_files[0].name} were rounded before, to {bits:.1f} bits each ({names}): what that "
        "cost stays, and losses are measured against the rounded weights"
    )


def _reordered(path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The tensors whose rows are in another order, with their number of heads."""
    result: dict[str, int] = {}
    for name, info in infos.items():
        if (heads := reordered_heads(config, name)) is None:
            continue
        if info.shape[0] % (2 * heads):
            raise BadFileError(path, f"{name} has {info.shape[0]} rows, not pairs for {heads} heads", OTHER)
        result[name] = heads
    return result


def _read_dtype(path: Path, name: str, kind: int) -> str:
    """What a tensor of this ggml type is read as. Raises ``UserError`` for a type without a decoder."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if kind in GGML_DTYPES:
        return GGML_DTYPES[kind]
    known = GGMLQuantizationType(kind)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except NotImplementedError:
        raise UserError(f"{path}: tensor {name!r} has type {known.name}, which cannot be decoded here") from None
    return "F32"


def _dequantized(path: Path, tensor: GgufTensor, info: TensorInfo) -> torch.Tensor:
    """The values of a tensor in ``info``'s dtype; apart from the result, memory for a few rows only."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    dtype = DTYPES[info.dtype]
    result = allocate_bytes(path, info.elements * dtype.itemsize)
    with InputFile(path) as file:
        if tensor.kind in GGML_DTYPES:
            file.fill(result.numpy().data, tensor.begin)
            return result.view(dtype).view(info.shape)
        values = result.view(dtype).view(-1, info.shape[-1]).numpy()  # whose copies need no threads to wait for
        row_bytes = (tensor.end - tensor.begin) // values.shape[0]
        step = max(1, _VALUES_AT_ONCE // info.shape[-1])
        for row in range(0, values.shape[0], step):
            rows = min(step, values.shape[0] - row)
            raw = np.frombuffer(file.read(tensor.begin + row * row_bytes, rows * row_bytes), np.uint8)
            with np.errstate(all="ignore"):  # damaged scales give NaN, which whoever uses the weights checks for
                decoded = dequantize(raw.reshape(1, -1), GGMLQuantizationType(tensor.kind))
            values[row : row + rows] = decoded.reshape(rows, -1)
    return result.view(dtype).view(info.shape)
