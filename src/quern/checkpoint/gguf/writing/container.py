"""The file itself: metadata, descriptions of all tensors, and then the data, tensor after tensor as it comes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from quern.checkpoint.files import explain_write_errors
from quern.core.errors import UserError

ALIGNMENT = 32
"""Every tensor begins at a multiple of it."""
LONGEST_NAME = 63
"""Characters of a tensor's name, as ggml allows."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a file that is yet to be written."""

    name: str
    shape: tuple[int, ...]
    """Of its values, in torch's order."""
    kind: str
    """Name of its ggml type."""

    @property
    def stored_bytes(self) -> int:
        """In the file, without padding. Raises ``UserError`` for rows that are no whole blocks of the type."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        if self.shape[-1] % block:
            raise UserError(f"{self.name} has rows of {self.shape[-1]} weights, which are no whole {self.kind} blocks")
        return math.prod(self.shape) // int(block) * int(size)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorPlan],
    data: Iterable[torch.Tensor],
) -> None:
    """Write a GGUF file of version 3.

    ``metadata``: texts, truth values, whole numbers (uint32), other numbers (float32) and lists of these (whole numbers of
    lists are int32); ``general.architecture`` is among them. ``data``: of each tensor in turn its values, or bytes uint8
    where its type is one of blocks; one of them is in memory at a time. Raises ``UserError`` where the disk does not take
    them; what is at ``path`` then is no whole file.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    sizes = [tensor.stored_bytes for tensor in tensors]
    with explain_write_errors(path, sum(sizes)):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(path, metadata["general.architecture"])
        for key, value in metadata.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for tensor, size in zip(tensors, sizes, strict=True):
            assert len(tensor.name) <= LONGEST_NAME
            kind = GGMLQuantizationType[tensor.kind]
            # With another dtype than uint8 the shape is that of the values.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        with open(path, "ab") as file:
            _pad(file)
            for tensor, size, values in zip(tensors, sizes, data, strict=True):
                raw = values.contiguous().reshape(-1).view(torch.uint8).numpy()
                assert raw.nbytes == size, (tensor.name, raw.nbytes, size)
                file.write(raw.data)  # which, unlike what the package does, says what stops it
                _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    if isinstance(value, list | tuple):
        if value:
            writer.add_key_value(key, list(value), GGUFValueType.ARRAY, _element_type(value))
        return
    whole = type(value) is int
    kind = GGUFValueType.UINT32 if whole else GGUFValueType.get_type(value)
    if whole and not 0 <= value < 2**32:
        raise UserError(f"{key} would be {value}, which is no number of 32 bits that a GGUF holds")
    writer.add_key_value(key, value, kind)


def _element_type(values: Sequence[Any]) -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.get_type(values[0])
