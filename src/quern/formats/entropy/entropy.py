"""Entropy-coded tensors: fewer bytes on the disk, and bit for bit the same tensor in memory (docs/format.md).

The last stage of Deep Compression (Han et al. 2016, arXiv 1510.00149, section 4): what quantization stores is not spread
evenly over its codes, so a code of variable length takes fewer bits. The coder is zstd, of which only the entropy coder
(Huffman) does anything here; what is ours is which symbols it gets:

- integers of ``b`` bits, packed without gaps: as many whole codes as a byte holds are one symbol, so that none straddles
- floating-point numbers: a plane of exponents, which a few values dominate, and planes of the rest, which are noise
- anything else: its bytes

A tensor is cut into chunks that are coded alone, so that memory is bounded and threads share the work.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quern.checkpoint.files import InputFile
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo, allocate_bytes
from quern.core.errors import BadFileError, UserError
from quern.core.machine.parallel import Workers, pieces
from quern.formats.entropy.symbols import CODED, PLANES, Coding, Octets, merge, split

LEAST_BYTES = 4096
"""Smaller tensors stay as they are."""
LEAST_GAIN = 64
"""A tensor stays as it is where coding would save less than one part in so many."""
LENGTH = np.dtype("<u4")
"""Of an entry in the table of frames."""
LEAST_WINDOW = 1 << 10
"""The least that zstd can be told that a frame may ask to be kept of what was decoded."""
_MARK = 4
"""Bytes at the end of a frame: zstd's checksum of what it decodes to."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DAMAGED = "The artifact is damaged; get its files again, or quantize again"


def zstandard() -> Any:
    """The coder. Raises ``UserError`` where it is not installed."""
    try:
        return importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("zstandard"):
            raise
        raise UserError(
            "storage: entropy needs the package zstandard, which is not installed. Run: pip install 'quern[entropy]'"
        ) from None


def coder_version() -> str:
    """The version of zstd, on which coded bytes depend."""
    return ".".join(map(str, zstandard().ZSTD_VERSION))


def encode(tensor: Tensor, bits: int = 8) -> tuple[Tensor, Coding] | None:
    """``tensor`` coded, uint8 ``(bytes,)``, and how; None where it stays as it is.

    ``bits``: of the codes that integers without planes are packed from.
    """
    dtype = _NAMES[tensor.dtype]
    if tensor.nbytes < LEAST_BYTES or dtype not in CODED:
        return None
    planes = PLANES.get(dtype, 1)
    width = 8 if planes > 1 else bits * (8 // bits)
    coding = Coding(dtype, tuple(tensor.shape), planes, width, 0)
    raw = _octets(tensor)
    frames = [frame for piece in pieces(raw.size, coding.chunk_bytes) for frame in _frames(raw[slice(*piece)], coding)]
    table = np.array([len(frame) for frame in frames], LENGTH).tobytes()
    coded = b"".join([table, *frames])
    if len(coded) > raw.size - raw.size // LEAST_GAIN:
        return None
    checksum = zlib.crc32(b"".join(frame[-_MARK:] for frame in frames))
    stored = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    return stored, Coding(dtype, tuple(tensor.shape), planes, width, checksum)


def _octets(tensor: Tensor) -> Octets:
    """The tensor's bytes, little-endian and row-major."""
    # A contiguous tensor of one element may have any stride, which view() would not take.
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    octets: Octets = flat.view(torch.uint8).numpy()
    return octets


def _frames(raw: Octets, coding: Coding) -> Iterator[bytes]:
    """A chunk's planes, coded."""
    module = zstandard()
    # Long matches do not occur in weights and short ones cost more than they save: the least that zstd can be told to look
    # for them leaves the literals, which Huffman codes take. Negative levels would not code literals at all.
    parameters = module.ZstdCompressionParameters(
        compression_level=1,
        strategy=module.STRATEGY_DFAST,
        window_log=20,
        hash_log=6,
        chain_log=6,
        min_match=7,
        write_content_size=True,
        write_checksum=True,
        write_dict_id=False,
    )
    for symbols in split(raw, coding):
        yield module.ZstdCompressor(compression_params=parameters).compress(symbols)


@dataclass(frozen=True)
class _Chunk:
    """Where a chunk's frames lie in the file, and what of the tensor they decode to."""

    frames: tuple[tuple[int, int], ...]
    """Offset and length of each plane's."""
    begin: int
    end: int


class CodedTensor:
    """A coded tensor in a file: everything that is claimed of it is checked before memory is taken for it."""

    def __init__(self, file: InputFile, name: str, info: TensorInfo, coding: Coding) -> None:
        """``info``: where its bytes are. Raises ``BadFileError``."""
        self.file, self.name, self.coding = file, name, coding
        self._chunks = self._places(info)

    def bad(self, problem: str) -> BadFileError:
        """What is wrong with it."""
        return BadFileError(self.file.path, f"coded tensor {self.name!r} {problem}", _DAMAGED)

    def _places(self, info: TensorInfo) -> list[_Chunk]:
        coding, size = self.coding, self.coding.size
        if info.stored_bytes >= size:
            raise self.bad(
                f"takes {info.stored_bytes} bytes for {size}; a tensor that coding makes no smaller is not coded"
            )
        count = -(-size // coding.chunk_bytes) * coding.planes
        if count * LENGTH.itemsize > info.stored_bytes:
            raise self.bad(f"has {info.stored_bytes} bytes, too few for the table of its {count} frames")
        lengths = np.frombuffer(self.file.read(info.begin, count * LENGTH.itemsize), LENGTH).astype(np.int64)
        ends = info.begin + count * LENGTH.itemsize + lengths.cumsum()
        if int(ends[-1]) != info.end:
            raise self.bad(
                f"has a table of frames that ends at byte {int(ends[-1]) - info.begin} of its {info.stored_bytes}"
            )
        frames = [(int(end - length), int(length)) for end, length in zip(ends, lengths, strict=True)]
        planes = coding.planes
        return [
            _Chunk(tuple(frames[planes * place : planes * (place + 1)]), *part)
            for place, part in enumerate(pieces(size, coding.chunk_bytes))
        ]

    def read(self, workers: Workers) -> Tensor:
        """The tensor, in fresh memory on the CPU. Raises ``BadFileError`` for bytes that are not what was written."""
        buffer = allocate_bytes(self.file.path, self.coding.size)
        octets = buffer.numpy()

        def fill(chunk: _Chunk) -> bytes:
            planes, marks = self._decoded(chunk)
            try:
                merge(planes, self.coding, octets[chunk.begin : chunk.end])
            except ValueError as error:
                raise self.bad(str(error)) from None
            return marks

        self._check(workers.map(fill, self._chunks))
        return buffer.view(DTYPES[self.coding.dtype]).view(self.coding.shape)

    def counts(self, workers: Workers) -> NDArray[np.int64]:
        """How often each symbol occurs in each plane, ``(planes, 256)``. Raises ``BadFileError`` as ``read`` does."""

        def count(chunk: _Chunk) -> tuple[bytes, NDArray[np.int64]]:
            planes, marks = self._decoded(chunk)
            return marks, np.stack([np.bincount(plane, minlength=256) for plane in planes])

        found = workers.map(count, self._chunks)
        self._check([marks for marks, _ in found])
        total: NDArray[np.int64] = np.sum([counts for _, counts in found], axis=0)
        return total

    def _check(self, marks: list[bytes]) -> None:
        if zlib.crc32(b"".join(marks)) != self.coding.checksum:
            raise self.bad("has another checksum: its bytes are not those that were written under this name")

    def _decoded(self, chunk: _Chunk) -> tuple[list[Octets], bytes]:
        """The symbols of a chunk's planes, and the checksums of their frames."""
        symbols = self.coding.symbols(chunk.end - chunk.begin)
        frames = [self.file.read(begin, length) for begin, length in chunk.frames]
        planes = [np.frombuffer(self._decompressed(frame, symbols), np.uint8) for frame in frames]
        return planes, b"".join(frame[-_MARK:] for frame in frames)

    def _decompressed(self, frame: bytes, symbols: int) -> bytes:
        """What one frame holds, if that is ``symbols`` bytes: the frame's own claim is compared first."""
        module = zstandard()
        try:
            said = module.get_frame_parameters(frame)
            if said.content_size != symbols or not said.has_checksum or said.dict_id:
                raise self.bad(
                    f"has a frame of {said.content_size} symbols, checksum: {said.has_checksum}, dictionary "
                    f"{said.dict_id}; {symbols} with a checksum and without a dictionary are wanted"
                )
            decoder = module.ZstdDecompressor(max_window_size=max(symbols, LEAST_WINDOW))
            found: bytes = decoder.decompress(frame, max_output_size=symbols, allow_extra_data=False)
        except module.ZstdError as error:
            raise self.bad(f"cannot be decoded: {str(error)[:200]}") from None
        if len(found) != symbols:
            raise self.bad(f"has a frame of {len(found)} symbols where {symbols} are wanted")
        return found
