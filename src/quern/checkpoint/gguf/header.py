"""The header of a GGUF file, walked with suspicion: metadata and the place of every tensor.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic ``GGUF``, uint32 version,
uint64 tensor count, uint64 metadata count; the metadata (name, type, value); the tensors' descriptions (name,
dimensions from the fastest, type, offset); padding to the alignment; the data. Strings are a uint64 length and UTF-8.

A file can lie in these ways, and each is one ``BadFileError`` problem, found before anything of the claimed size is
allocated:

- no magic; big-endian; a version other than 2 and 3; counts beyond the cap or beyond what the file could hold
- the header running over the end of the file; a string longer than the file or the cap; a name or value not UTF-8
- an unknown value type; an array of arrays; an array beyond the cap or the file; a truth value that is neither 0 nor 1
- a metadata name or tensor name given twice; an alignment that is no power of two
- more than four dimensions, none, an empty one, or more elements than 63 bits count; an unknown type; rows that are not
  whole blocks of their type
- a tensor that is not aligned, lies out of the file, or overlaps another
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.checkpoint.files import InputFile, refuse_pointer
from quern.core.errors import BadFileError

MOST_METADATA = 1 << 16
MOST_TENSORS = 1 << 20
MOST_ELEMENTS_OF_AN_ARRAY = 1 << 23
MOST_KEPT = 1 << 21
"""Values of an array that is read and not only counted; vocabularies have a tenth of that."""
LONGEST_NAME = 1 << 10
LONGEST_TEXT = 1 << 23
_LARGEST = 2**63 - 1
_LARGEST_ALIGNMENT = 1 << 16
_WINDOW = 1 << 20
_AGAIN = "Download the file again"

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_SIZES = {kind: struct.calcsize(form) for kind, form in _NUMBERS.items()}
_LEAST_METADATA = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata: its value type and how many values it has. The values are not kept."""

    kind: int
    count: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """``shape`` in torch's order (slowest dimension first), ``kind`` the ggml type's number, absolute byte offsets."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (numbers, texts; arrays as tuples where they were asked for, else by their length) and tensors by name, in
    the order of the file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Walker:
    """Reads a file from the front through a window of a megabyte; every step is checked against the file's size."""

    def __init__(self, file: InputFile, kept: frozenset[str]) -> None:
        self.file, self.kept = file, kept
        self.position = 0
        self._window = b""
        self._begin = 0

    def bad(self, problem: str) -> BadFileError:
        return BadFileError(self.file.path, problem, _AGAIN)

    def take(self, count: int) -> bytes:
        offset = self.position - self._begin
        if offset + count > len(self._window):
            if count > self.file.size - self.position:
                raise self.bad(f"its header runs over the end of the file at byte {self.position}")
            self._begin, offset = self.position, 0
            self._window = self.file.read(self._begin, max(count, min(_WINDOW, self.file.size - self._begin)))
        self.position += count
        return self._window[offset : offset + count]

    def skip(self, count: int) -> None:
        if count > self.file.size - self.position:
            raise self.bad(f"its header runs over the end of the file at byte {self.position}")
        self.position += count
        if self.position > self._begin + len(self._window):
            self._begin, self._window = self.position, b""

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def _limits(self, cap: int) -> str:
        left = self.file.size - self.position
        return f"at most {cap} are allowed, and {left} bytes of the file are left at byte {self.position}"

    def length(self, what: str, cap: int) -> int:
        count: int = self.number("<Q")
        if count > cap or count > self.file.size - self.position:
            raise self.bad(f"claims {what} of {count} bytes; {self._limits(cap)}")
        return count

    def text(self, what: str, cap: int) -> str:
        raw = self.take(self.length(what, cap))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} before byte {self.position} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind: int = self.number("<I")
        if kind == _STRING:
            return self.text(f"a text for {key!r}", LONGEST_TEXT)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise self.bad(f"metadata {key!r} has the unknown value type {kind}")
        return self._scalar(key, kind)

    def _scalar(self, key: str, kind: int) -> Any:
        value = self.number(_NUMBERS[kind])
        if kind == _BOOL and value > 1:
            raise self.bad(f"metadata {key!r} has the truth value {value}")
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> GgufArray | tuple[Any, ...]:
        kind: int = self.number("<I")
        count: int = self.number("<Q")
        least = 8 if kind == _STRING else _SIZES.get(kind)
        if least is None:
            raise self.bad(f"metadata {key!r} is an array of the unknown or unsupported value type {kind}")
        if count > MOST_ELEMENTS_OF_AN_ARRAY or count * least > self.file.size - self.position:
            raise self.bad(f"metadata {key!r} claims {count} values; {self._limits(MOST_ELEMENTS_OF_AN_ARRAY)}")
        if key in self.kept:
            if count > MOST_KEPT:
                raise self.bad(f"metadata {key!r} claims {count} values; at most {MOST_KEPT} are read")
            if kind == _STRING:
                return tuple(self.text(f"a text in {key!r}", LONGEST_TEXT) for _ in range(count))
            return tuple(self._scalar(key, kind) for _ in range(count))
        if kind != _STRING:
            self.skip(count * least)
        else:
            for _ in range(count):
                self.skip(self.length(f"a text in {key!r}", LONGEST_TEXT))
        return GgufArray(kind, count)


def read_gguf_header(path: str | Path, kept: frozenset[str] = frozenset()) -> GgufHeader:
    """Metadata and tensors of the GGUF file at ``path``. Raises ``BadFileError``.

    ``kept`` names arrays of the metadata whose values are wanted; of others only the length is kept.
    """
    with InputFile(path) as file:
        refuse_pointer(file)
        walker = _Walker(file, kept)
        tensor_count, metadata_count = _counts(walker)
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = walker.text("a metadata name", LONGEST_NAME)
            if key in metadata:
                raise walker.bad(f"names metadata {key!r} twice")
            metadata[key] = walker.value(key)
        described: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = walker.text("a tensor name", LONGEST_NAME)
            if name in described:
                raise walker.bad(f"names tensor {name!r} twice")
            described[name] = _description(walker, name)
        return GgufHeader(metadata, _placed(walker, described, _alignment(walker, metadata)))


def _counts(walker: _Walker) -> tuple[int, int]:
    if walker.file.size < 24 or walker.take(4) != b"GGUF":
        raise walker.bad("is not a GGUF file (it does not begin with GGUF and a header)")
    version = walker.number("<I")
    if version not in (2, 3):
        kind = " (big-endian?)" if version in (2 << 24, 3 << 24) else ""
        raise walker.bad(f"has GGUF version {version}{kind}; versions 2 and 3, little-endian, are read")
    tensors, metadata = walker.number("<Q"), walker.number("<Q")
    for what, count, cap, least in (
        ("tensors", tensors, MOST_TENSORS, _LEAST_TENSOR),
        ("metadata entries", metadata, MOST_METADATA, _LEAST_METADATA),
    ):
        if count > cap or count * least > walker.file.size:
            raise walker.bad(f"claims {count} {what}, more than the cap of {cap} or than the file can hold")
    return tensors, metadata


def _description(walker: _Walker, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape (slowest dimension first), type and relative offset of a tensor."""
    dimensions = walker.number("<I")
    if not 1 <= dimensions <= 4:
        raise walker.bad(f"tensor {name!r} has {dimensions} dimensions; 1 to 4 are allowed")
    sizes: tuple[int, ...] = struct.unpack(f"<{dimensions}Q", walker.take(8 * dimensions))
    if 0 in sizes or math.prod(sizes) > _LARGEST:
        raise walker.bad(f"tensor {name!r} has an impossible shape {sizes}")
    return sizes[::-1], walker.number("<I"), walker.number("<Q")


def _alignment(walker: _Walker, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise walker.bad(f"has general.alignment {alignment!r}, which is no power of two up to {_LARGEST_ALIGNMENT}")
    return alignment


def _placed(
    walker: _Walker, described: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: int
) -> dict[str, GgufTensor]:
    """The tensors with absolute offsets, in the order of their data."""
    data = -(-walker.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, (shape, kind, offset) in described.items():
        if offset % alignment:
            raise walker.bad(f"tensor {name!r} lies at offset {offset}, not a multiple of {alignment}")
        end = data + offset + _stored_bytes(walker, name, shape, kind)
        if end > walker.file.size:
            raise walker.bad(f"tensor {name!r} ends at byte {end}, but the file has {walker.file.size} bytes")
        tensors[name] = GgufTensor(shape, kind, data + offset, end)
    position, result = data, dict(sorted(tensors.items(), key=lambda item: item[1].begin))
    for name, tensor in result.items():
        if tensor.begin < position:
            raise walker.bad(f"tensor {name!r} overlaps the tensor before it")
        position = tensor.end
    return result


def _stored_bytes(walker: _Walker, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in set(GGMLQuantizationType):
        raise walker.bad(f"tensor {name!r} has the unknown type {kind}")
    block: int
    size: int
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block:
        raise walker.bad(f"tensor {name!r} has rows of {shape[-1]}, not whole blocks of {block}")
    return math.prod(shape) // block * size
