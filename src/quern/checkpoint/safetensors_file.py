"""Safetensors files, read with suspicion and written with the same bytes every time.

The format (https://huggingface.co/docs/safetensors): eight bytes of little-endian header length N; N bytes of JSON that
map each tensor's name to ``dtype``, ``shape`` and ``data_offsets`` (begin, end; relative to byte 8 + N); then the
tensors, without gaps, to the end of the file.

A file can lie in these ways, and each is one ``BadFileError`` problem, found before anything of the claimed size is
allocated:

- too short for the header length; header length beyond the cap or beyond the file; header empty
- header not UTF-8, not JSON, not an object, nested too deeply, a name given twice
- ``__metadata__`` not a map from text to text
- an entry with other keys than the three; an unknown dtype; a shape or offset that is no non-negative integer; too many
  dimensions; more elements than 63 bits count
- offsets reversed, out of the file, overlapping, or leaving a gap; bytes after the last tensor
- offsets that span another number of bytes than dtype and shape need
- a file shorter than when its header was read; a truth value that is neither 0 nor 1
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quern.checkpoint.files import InputFile, atomic_output, parse_json_object, refuse_pointer
from quern.core.errors import BadFileError, UserError
from quern.core.text.units import bytes_text

HEADER_LIMIT = 100_000_000
"""Most bytes of a header; the limit of the safetensors package too."""
ALIGNMENT = 64
"""Where tensors begin in a file that is written: a line of the cache, so that a register's worth of a memory-mapped
tensor is one line and not parts of two."""
METADATA = {"format": "pt"}
"""``__metadata__`` of a model's weights. Older versions of transformers refuse files without it, and accelerate warns."""
_MOST_DIMENSIONS = 64
_LARGEST = 2**63 - 1
_AGAIN = "Download the file again, or save it again with the safetensors package"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Names of dtypes in a header, in the order of the safetensors package, which files sort by."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor. ``begin`` and ``end`` are absolute byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Names and places of all tensors of a file, in the order of their data. Raises ``BadFileError``."""
    with InputFile(path) as file:
        refuse_pointer(file)
        if file.size < 8:
            raise BadFileError(path, f"has {file.size} bytes, too short for a safetensors file", _AGAIN)
        length = int.from_bytes(file.read(0, 8), "little")
        if length > HEADER_LIMIT:
            raise BadFileError(path, f"claims a header of {length} bytes; at most {HEADER_LIMIT} are allowed", _AGAIN)
        if length > file.size - 8:
            raise BadFileError(path, f"claims a header of {length} bytes but has {file.size} bytes in all", _AGAIN)
        if length == 0:
            raise BadFileError(path, "claims an empty header", _AGAIN)
        header = parse_json_object(path, file.read(8, length), "the safetensors header")
        size = file.size
    _check_metadata(path, header.pop("__metadata__", {}))
    tensors = {name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()}
    return _in_order(path, tensors, 8 + length, size)


def _check_metadata(path: str | Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFileError(path, "has a __metadata__ that is not a map from text to text", _AGAIN)


def _tensor_info(path: str | Path, name: str, entry: Any, data_begin: int, file_size: int) -> TensorInfo:
    def bad(problem: str) -> BadFileError:
        return BadFileError(path, f"tensor {name[:200]!r} {problem}", _AGAIN)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"has dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPES)}")
    if not _is_counts(shape):
        raise bad("has a shape that is not a list of non-negative integers")
    if len(shape) > _MOST_DIMENSIONS:
        raise bad(f"has {len(shape)} dimensions; at most {_MOST_DIMENSIONS} are allowed")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise bad("has data_offsets that are not two non-negative integers")
    begin, end = offsets
    if begin > end:
        raise bad(f"ends at byte {end} of the data, before it begins at {begin}")
    if end > file_size - data_begin:
        raise bad(f"ends at byte {end} of the data, which has {file_size - data_begin} bytes")
    elements = product = 1
    for count in shape:
        elements *= count
        # Strides overflow even where another dimension is empty.
        product *= max(count, 1)
        if product > _LARGEST:
            raise bad("has a shape with more elements than 63 bits count")
    if elements * DTYPES[dtype].itemsize != end - begin:
        raise bad(f"has {elements} elements of {dtype}, but its offsets span {end - begin} bytes")
    return TensorInfo(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST for item in value)


def _in_order(path: str | Path, tensors: dict[str, TensorInfo], data_begin: int, size: int) -> dict[str, TensorInfo]:
    """``tensors`` sorted by place, if they fill the data without overlap and without gap."""
    result = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end, item[0])))
    position = data_begin
    for name, info in result.items():
        if info.begin != position:
            what = "overlaps the tensor before it" if info.begin < position else "leaves a gap before it"
            raise BadFileError(path, f"tensor {name[:200]!r} {what}", _AGAIN)
        position = info.end
    if position != size:
        raise BadFileError(path, f"has {size - position} bytes that belong to no tensor", _AGAIN)
    return result


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, by name. Raises ``BadFileError``."""
    return {name: read_tensor(path, info) for name, info in read_header(path).items()}


def read_tensor(path: str | Path, info: TensorInfo) -> torch.Tensor:
    """The tensor that ``read_header(path)`` described: fresh memory, contiguous, 64-byte aligned, on the CPU.

    Raises ``BadFileError`` when the file is shorter than its header said, ``UserError`` when memory does not suffice.
    """
    with InputFile(path) as file:
        buffer = allocate_bytes(path, info.stored_bytes)
        file.fill(buffer.numpy().data, info.begin)
    if info.dtype == "BOOL" and bool((buffer > 1).any()):
        raise BadFileError(path, f"the BOOL tensor at byte {info.begin} holds bytes other than 0 and 1", _AGAIN)
    return buffer.view(DTYPES[info.dtype]).view(info.shape)


def allocate_bytes(path: str | Path, count: int) -> torch.Tensor:
    """Uninitialized uint8 memory for ``count`` bytes of ``path``; ``UserError`` where the machine has not so much."""
    try:
        return torch.empty(count, dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        raise UserError(
            f"{path}: one tensor needs {bytes_text(count)} of memory, which this machine does not give. "
            "Use a machine with more memory"
        ) from None


def write_safetensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write ``tensors`` (any shape and device, dtypes of ``DTYPES``) to ``path``, whole or not at all.

    The bytes depend on names, values and metadata only, not on the order of the arguments. Tensors whose size is a
    multiple of ``ALIGNMENT`` come first, then the others; among them larger dtypes first, as the safetensors package
    orders them, then by name. Metadata is sorted, and the header is padded with spaces so that tensors begin on a multiple
    of ``ALIGNMENT`` in the file. Raises ``UserError`` for a full disk or a folder that may not be written.
    """

    order = _order(tensors)
    header = _header_bytes(tensors, order, metadata or {})
    needed = 8 + len(header) + sum(_stored_bytes(tensor) for tensor in tensors.values())
    with atomic_output(Path(path), needed) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            # A contiguous tensor of one element may have any stride, which view() would not take.
            flat = tensors[name].detach().cpu().contiguous().as_strided((tensors[name].numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)


def file_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> int:
    """Bytes of the file that ``write_safetensors`` would write; the tensors may be on the device ``meta``."""
    header = _header_bytes(tensors, _order(tensors), metadata or {})
    return 8 + len(header) + sum(_stored_bytes(tensor) for tensor in tensors.values())


def _order(tensors: dict[str, torch.Tensor]) -> list[str]:
    def place(name: str) -> tuple[bool, int, bytes]:
        tensor = tensors[name]
        return _stored_bytes(tensor) % ALIGNMENT != 0, -_RANK[_NAMES[tensor.dtype]], name.encode()

    return sorted(tensors, key=place)


def _header_bytes(tensors: dict[str, torch.Tensor], order: list[str], metadata: dict[str, str]) -> bytes:
    assert "__metadata__" not in tensors, "a tensor cannot be called __metadata__"
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        end = position + _stored_bytes(tensors[name])
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-(8 + len(raw)) % ALIGNMENT)


def _stored_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
