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
from quern.core.machine.temporary import temporary_folder

ALIGNMENT = 32
"""Every tensor begins at a multiple of it."""
OTHER_HEAD = 256
"""Bytes that suffice for the head of a file that is not a model's first, without what it says of tensors."""
ARCHITECTURE = "general.architecture"
"""The key that every file has."""
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


def begin_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorPlan]) -> int:
    """Write what stands in front of the data of a GGUF file of version 3; where the first tensor begins.

    ``metadata``: texts, truth values, whole numbers (uint32, or the type of a numpy number), other numbers (float32) and
    lists of these (whole numbers of lists are int32); ``general.architecture`` is among them. Raises ``UserError`` where the
    disk does not take it.
    """
    with explain_write_errors(path, sum(padded(tensor.stored_bytes) for tensor in tensors)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_head(path, metadata, tensors)
        with open(path, "ab") as file:
            return _pad(file)


def append_tensor(path: Path, begin: int, tensor: TensorPlan, values: torch.Tensor) -> int:
    """Write a tensor at the byte ``begin`` of a file and cut off what was behind; where the next one begins.

    ``values``: in the tensor's own type, or bytes uint8 where it is one of blocks. Raises ``UserError`` where the disk does
    not take them.
    """
    raw = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    assert raw.nbytes == tensor.stored_bytes, (tensor.name, raw.nbytes, tensor.stored_bytes)
    with explain_write_errors(path, raw.nbytes), open(path, "r+b") as file:
        file.truncate(begin)
        file.seek(begin)
        file.write(raw.data)  # which, unlike what the package does, says what stops it
        return _pad(file)


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorPlan], data: Iterable[torch.Tensor]
) -> None:
    """A whole file, of each tensor's values in turn; one of them is in memory at a time."""
    end = begin_gguf(path, metadata, tensors)
    for tensor, values in zip(tensors, data, strict=True):
        end = append_tensor(path, end, tensor, values)


def head_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorPlan]) -> int:
    """Bytes in front of the data of the first tensor, before they are padded. They do not depend on the tensors' types."""
    with temporary_folder("gguf") as folder:
        _write_head(folder / "head.gguf", metadata, tensors)
        return (folder / "head.gguf").stat().st_size


def in_parts(tensors: Sequence[TensorPlan], most: int | None, head: int) -> list[list[TensorPlan]]:
    """The tensors by file, in order, so that a file has more than ``most`` bytes only where one tensor has; None: one file.

    ``head``: bytes in front of the tensors of the first one, where all of them are described there.
    """
    parts: list[list[TensorPlan]] = [[]]
    size = padded(head)
    for tensor in tensors:
        own = padded(tensor.stored_bytes) + (0 if len(parts) == 1 else _info_bytes(tensor))
        if most is not None and parts[-1] and size + own > most:
            parts.append([])
            size, own = OTHER_HEAD, padded(tensor.stored_bytes) + _info_bytes(tensor)
        parts[-1].append(tensor)
        size += own
    return parts


def _info_bytes(tensor: TensorPlan) -> int:
    """What a file says of a tensor: name, shape, type and place."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def padded(size: int) -> int:
    """Bytes that ``size`` bytes take with what fills them up to the next tensor."""
    return size + -size % ALIGNMENT


def _write_head(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorPlan]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, metadata[ARCHITECTURE])
    for key, value in metadata.items():
        if key != ARCHITECTURE:
            _add(writer, key, value)
    for tensor in tensors:
        assert len(tensor.name) <= LONGEST_NAME
        kind = GGMLQuantizationType[tensor.kind]
        # With another dtype than uint8 the shape is that of the values.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.stored_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pad(file: BinaryIO) -> int:
    """Fill the file up to where a tensor may begin; that place."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    return file.tell()


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    if isinstance(value, list | tuple):
        if value:
            writer.add_key_value(key, list(value), GGUFValueType.ARRAY, _element_type(value))
        return
    if isinstance(value, np.generic):
        writer.add_key_value(key, value.item(), GGUFValueType[value.dtype.name.upper()])
        return
    whole = type(value) is int
    kind = GGUFValueType.UINT32 if whole else GGUFValueType.get_type(value)
    if whole and not 0 <= value < 2**32:
        raise UserError(f"{key} would be {value}, which is no number of 32 bits that a GGUF holds")
    writer.add_key_value(key, value, kind)


def _element_type(values: Sequence[Any]) -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.get_type(values[0])
