"""An artifact's tensors as the native kernels read them: views on the memory-mapped files, nothing repacked; tensors that
lie there in another form (entropy-coded ones) are decoded into memory once."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quern import _native
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import CODECS, codec_of
from quern.codecs.integer import IntegerCodec
from quern.codecs.trellis import TrellisCodec
from quern.core.errors import BadFileError
from quern.core.scheme import CodecScheme
from quern.formats.base import StoredModule
from quern.formats.quern import INPUT_SIGNS

NATIVE_BITS = 4
"""Integer codes of this width are read as they are stored, and so are symmetric bytes."""
INPUT_GROUP = 64
"""Inputs that share a scale in front of weights with one scale a row. A single scale a token would let the few largest
inputs of a token decide how coarsely all others are rounded."""

FINE_BITS = 8
"""Integer weights of so many bits get inputs as two int8 numbers each. Rounding the inputs to one would cost about ten times
what rounding the weights did; the second one is nearly free where memory limits, because the weights are read once."""


def unsupported(scheme: CodecScheme) -> str | None:
    """Why the native kernels cannot read weights of ``scheme``; None if they can."""
    codec = codec_of(scheme) if scheme.codec in CODECS.names() else None
    if isinstance(codec, TrellisCodec):
        return None
    if not isinstance(codec, IntegerCodec):
        return f"it has no kernel for the codec {scheme.codec}"
    if codec.params.bits == 8 and not codec.params.symmetric:
        return "it has no kernel for asymmetric 8-bit weights"
    return None


class MappedWeights:
    """The weights of one model, file by file in one read-only mapping.

    The checkpoint fits its configuration (``quern.loading``), so its tensors have the names, shapes and dtypes that are
    asked for.
    """

    def __init__(self, checkpoint: Checkpoint, modules: Mapping[str, StoredModule]) -> None:
        """``modules``: those whose weights are stored as codes, as their artifact says."""
        self._checkpoint, self._modules = checkpoint, modules
        self._files: dict[Path, NDArray[np.uint8]] = {}
        self._decoded: dict[str, NDArray[np.uint8]] = {}
        self.read_bytes = 0
        """Bytes of all linears and vectors handed out so far."""

    def linear(self, name: str, shape: tuple[int, int], *, bias: bool = True) -> _native.Linear:
        """The linear called ``name``, ``(rows, columns)``, with signs, and a bias if asked for, where it has them."""
        stored = self._modules.get(name)
        # Whether it was made for int8 inputs with one scale a token.
        scale_per_token = stored is not None and stored.activations == "dynamic"
        signs = f"{name}.{INPUT_SIGNS}"
        matrix = self.matrix(name, shape, None if scale_per_token or self._has(signs) else INPUT_GROUP)
        self.read_bytes += matrix.bytes
        return _native.Linear(
            matrix,
            self.optional_vector(f"{name}.bias", shape[0]) if bias else None,
            self._mapped(signs, ((shape[1] + 7) // 8,), torch.uint8) if self._has(signs) else None,
            fine=self._fine(name) and not scale_per_token,
        )

    def _fine(self, name: str) -> bool:
        """Whether int8 inputs would lose more than the weights did."""
        stored = self._modules.get(name)
        codec = None if stored is None else codec_of(stored.scheme)
        return isinstance(codec, IntegerCodec) and codec.params.bits >= FINE_BITS

    def matrix(self, name: str, shape: tuple[int, int], input_group: int | None = None) -> _native.Matrix:
        """The packed weight of module ``name``; integers with one scale a row repeat it for ``input_group`` columns each."""
        stored = self._modules.get(name)
        if stored is None:
            return self._plain(f"{name}.weight", shape)
        codec = codec_of(stored.scheme)
        repacked = isinstance(codec, IntegerCodec) and codec.params.bits not in (NATIVE_BITS, 8)
        parts = {
            part: self._mapped(f"{name}.{part}", size, dtype)
            for part, (size, dtype) in codec.part_shapes(shape).items()
            if not (repacked and part == "codes")
        }
        if isinstance(codec, TrellisCodec):
            return _trellis(codec, shape, parts)
        assert isinstance(codec, IntegerCodec)
        return self._integer(name, codec, shape, parts, input_group)

    def vector(self, name: str, length: int) -> NDArray[np.float32]:
        """A small tensor of ``length`` numbers as float32."""
        info = self._checkpoint.info(name)
        assert info.shape == (length,)
        self.read_bytes += info.stored_bytes
        return self._checkpoint.read(name, finite=True).float().numpy()

    def optional_vector(self, name: str, length: int) -> NDArray[np.float32] | None:
        """The same, or None where the model has none of that name."""
        return self.vector(name, length) if self._has(name) else None

    def _has(self, name: str) -> bool:
        return name in self._checkpoint.source.infos

    def _mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> NDArray[np.uint8]:
        """The bytes of a tensor of ``shape`` and ``dtype``, aligned to its numbers.

        Files may hold tensors anywhere; those that kernels cannot read where they lie are copied.
        """
        info, place = self._checkpoint.info(name), self._checkpoint.source.place(name)
        assert (info.shape, DTYPES[info.dtype]) == (shape, dtype)
        if not self._checkpoint.source.plain(name):
            return self._in_memory(name, dtype)
        if place not in self._files:
            self._files[place] = _map(place)
        if len(self._files[place]) < info.end:
            raise BadFileError(place, f"is shorter than its header says ({name!r} is cut off)", "Copy the file again")
        stored = self._files[place][info.begin : info.end]
        return stored if info.begin % dtype.itemsize == 0 else stored.copy()

    def _in_memory(self, name: str, dtype: torch.dtype, finite: bool = False) -> NDArray[np.uint8]:
        """The bytes of a tensor as ``dtype``, read once: an embedding that is the head too is asked for twice."""
        if name not in self._decoded:
            values = self._checkpoint.read(name, finite=finite).to(dtype)
            self._decoded[name] = values.reshape(-1).view(torch.uint8).numpy()
        return self._decoded[name]

    def _plain(self, name: str, shape: tuple[int, int]) -> _native.Matrix:
        stored = DTYPES[self._checkpoint.info(name).dtype]
        kernel = stored if stored in (torch.bfloat16, torch.float32) else torch.float32
        if stored is kernel and self._checkpoint.source.plain(name):
            codes = self._mapped(name, shape, stored)
        else:
            codes = self._in_memory(name, kernel, finite=True)
        return _native.Matrix(str(kernel).removeprefix("torch."), *shape, codes)

    def _integer(
        self, name: str, codec: IntegerCodec, shape: tuple[int, int], parts: dict[str, Any], input_group: int | None
    ) -> _native.Matrix:
        params, group = codec.params, codec.group_width(shape[1])
        if input_group is not None and input_group < shape[1] == group:
            group, repeats = input_group, -(-shape[1] // input_group)
            for part, size in {"scale": getattr(torch, params.scale_dtype).itemsize, "zero_point": 4}.items():
                if part in parts:
                    parts[part] = parts[part].reshape(-1, 1, size).repeat(repeats, axis=1).reshape(-1)
        scaling = {
            "scale": parts["scale"],
            "scale_type": params.scale_dtype,
            "group": group,
            "one_scale": params.granularity == "tensor",
        }
        if params.bits == NATIVE_BITS:
            return _native.Matrix("integer4", *shape, parts["codes"], zeros=parts.get("zero_point"), **scaling)
        if params.bits == 8:
            return _native.Matrix("integer8", *shape, parts["codes"], **scaling)
        # Other widths have no kernel of their own: code - zero point fits a byte up to seven bits.
        stored = {part: self._checkpoint.read(f"{name}.{part}") for part in codec.part_shapes(shape)}
        stored["scale"] = torch.ones_like(stored["scale"])
        differences = codec.decode(shape, stored).to(torch.int8).numpy()
        return _native.Matrix("integer8", *shape, differences.reshape(-1).view(np.uint8), **scaling)


def _map(place: Path) -> NDArray[np.uint8]:
    """A file in memory, read-only and shared with whoever maps it too; in huge pages where the system can.

    Products walk through all weights for every token: with small pages, looking up where they lie costs up to a fifth.
    """
    with place.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def _trellis(codec: TrellisCodec, shape: tuple[int, int], parts: dict[str, Any]) -> _native.Matrix:
    return _native.Matrix(
        "trellis",
        *shape,
        parts["codes"],
        scale=parts["scale"],
        scale_type=codec.params.scale_dtype,
        table=parts["table"].view(np.int8),
        bits=codec.params.bits,
        window=codec.window,
        tables=codec.tables,
        lag=codec.lag,
    )
