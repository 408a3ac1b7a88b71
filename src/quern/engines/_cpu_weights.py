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
from quern.checkpoint.gguf.file import GgufSource
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import CODECS, Codec, KernelForm, codec_of
from quern.core.errors import BadFileError
from quern.core.scheme import CodecScheme
from quern.engines._cpu_blocks import GgufBlocks
from quern.formats.base import StoredModule
from quern.formats.quern import INPUT_SCALE, INPUT_SIGNS

REPEATED = {"scale", "zeros"}
"""What each group of columns has one of."""
INPUT_GROUP = 64
"""Inputs that share a scale in front of weights with one scale a row. A single scale a token would let the few largest
inputs of a token decide how coarsely all others are rounded."""
_WEIGHTS_AT_ONCE = 1 << 24
"""Weights that are packed into blocks at a time."""


def unsupported(scheme: CodecScheme) -> str | None:
    """Why the native kernels cannot read weights of ``scheme``; None if they can."""
    if scheme.codec not in CODECS.names():
        return f"it has no kernel for the codec {scheme.codec}"
    form = codec_of(scheme).kernel((1, 1))
    return form if isinstance(form, str) else None


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
        source = checkpoint.source
        self._blocks = GgufBlocks(source) if isinstance(source, GgufSource) else None
        self.read_bytes = 0
        """Bytes of all linears and vectors handed out so far."""

    def linear(self, name: str, shape: tuple[int, int], *, bias: bool = True) -> _native.Linear:
        """The linear called ``name``, ``(rows, columns)``, with signs, and a bias if asked for, where it has them."""
        stored = self._modules.get(name)
        said = stored if stored is not None and stored.activations != "none" else None  # made for int8 inputs
        signs = f"{name}.{INPUT_SIGNS}"
        matrix = self.matrix(name, shape, said.input_group if said else None if self._has(signs) else INPUT_GROUP)
        form = self._form(name, shape)
        # A table of the codec's own is no part of the file.
        self.read_bytes += matrix.bytes - (form.options["table"].nbytes if form and "table" in form.options else 0)
        self.read_bytes += torch.float32.itemsize if form and form.factor else 0
        return _native.Linear(
            matrix,
            self.optional_vector(f"{name}.bias", shape[0]) if bias else None,
            self._mapped(signs, ((shape[1] + 7) // 8,), torch.uint8) if self._has(signs) else None,
            fine=form is not None and form.fine and said is None,
            input_scale=self._input_scale(name) if said and said.activations == "static" else None,
            one_input_scale=said is not None and said.input_group is None,
        )

    def _input_scale(self, name: str) -> float:
        """The calibrated scale of static activations. Raises ``BadFileError`` for what is none."""
        scale = float(self._checkpoint.read(f"{name}.{INPUT_SCALE}", finite=True))
        if not scale >= torch.finfo(torch.float32).tiny:
            place = self._checkpoint.source.place(f"{name}.{INPUT_SCALE}")
            raise BadFileError(
                place, f"says that the inputs of {name} have the scale {scale:g}", "Quantize the model again"
            )
        return scale

    def _form(self, name: str, shape: tuple[int, int]) -> KernelForm | None:
        """How kernels read the codes of module ``name``; None for one that is not stored as codes."""
        stored = self._modules.get(name)
        if stored is None:
            return None if self._blocks is None else self._blocks.form(name, shape)
        form = codec_of(stored.scheme).kernel(shape)
        assert not isinstance(form, str)  # the engine has asked
        return form

    def matrix(self, name: str, shape: tuple[int, int], input_group: int | None = None) -> _native.Matrix:
        """The packed weight of module ``name``; one scale a row is repeated for ``input_group`` columns each."""
        form = self._form(name, shape)
        if form is None:
            return self._plain(f"{name}.weight", shape)
        if name not in self._modules:
            assert self._blocks is not None
            arrays = self._blocks.arrays(name, shape, form, self._bytes(f"{name}.weight"))
            return _matrix(form, shape, arrays, form.group)
        return self._of_form(name, codec_of(self._modules[name].scheme), form, shape, input_group)

    def notes(self) -> list[str]:
        """What whoever runs the model should know of its matrices, once all were asked for."""
        return [] if self._blocks is None else self._blocks.notes()

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
        info = self._checkpoint.info(name)
        assert (info.shape, DTYPES[info.dtype]) == (shape, dtype)
        if not self._checkpoint.source.plain(name):
            return self._in_memory(name, dtype)
        stored = self._bytes(name)
        return stored if info.begin % dtype.itemsize == 0 else stored.copy()

    def _bytes(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor where they lie."""
        info, place = self._checkpoint.info(name), self._checkpoint.source.place(name)
        if place not in self._files:
            self._files[place] = _map(place)
        if len(self._files[place]) < info.end:
            raise BadFileError(place, f"is shorter than its header says ({name!r} is cut off)", "Copy the file again")
        return self._files[place][info.begin : info.end]

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

    def _of_form(
        self, name: str, codec: Codec, form: KernelForm, shape: tuple[int, int], input_group: int | None
    ) -> _native.Matrix:
        """The matrix of ``form``: the parts' own bytes, but for scales that several rows share or that are repeated."""
        if form.blocks:
            return _matrix(form, shape, {"codes": self._packed_blocks(name, codec, shape)}, form.group)
        sizes = codec.part_shapes(shape)
        arrays = {
            key: self._mapped(f"{name}.{part}", *sizes[part])
            for key, part in form.arrays.items()
            if not (form.decoded and key == "codes")
        }
        if form.decoded:
            stored = {part: self._checkpoint.read(f"{name}.{part}") for part in sizes}
            arrays["codes"] = codec.integers(shape, stored).numpy().reshape(-1).view(np.uint8)
        repeats, group = 1, form.group
        if input_group is not None and not form.exact_inputs and group == shape[1] > input_group:
            repeats, group = -(-shape[1] // input_group), input_group
        if repeats > 1 or form.scale_rows > 1:
            for key in REPEATED & set(arrays):
                (scale_rows, groups), dtype = sizes[form.arrays[key]]
                wide = arrays[key].reshape(scale_rows, groups, dtype.itemsize).repeat(repeats, axis=1)
                if form.scale_rows > 1:
                    wide = wide.repeat(form.scale_rows, axis=0)[: shape[0]]
                arrays[key] = wide.reshape(-1)
        if "table" in arrays:
            arrays["table"] = arrays["table"].view(np.int8)
        factor: dict[str, Any] = {}
        if form.factor is not None:
            part, times = form.factor
            factor["scale_factor"] = times * float(self._checkpoint.read(f"{name}.{part}", finite=True).item())
        return _matrix(form, shape, {**arrays, **factor}, group)

    def _packed_blocks(self, name: str, codec: Codec, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """The matrix in ggml's blocks, made once: an embedding that is the head too is asked for twice."""
        if name not in self._decoded:
            stored = {part: self._checkpoint.read(f"{name}.{part}") for part in codec.part_shapes(shape)}
            step = max(1, _WEIGHTS_AT_ONCE // shape[1])
            rows = []
            for first in range(0, shape[0], step):
                some = {part: tensor[first : first + step] for part, tensor in stored.items()}
                rows.append(codec.ggml_blocks((min(step, shape[0] - first), shape[1]), some).data)
            self._decoded[name] = torch.cat(rows).reshape(-1).numpy()
        return self._decoded[name]


def _matrix(form: KernelForm, shape: tuple[int, int], given: Mapping[str, Any], group: int | None) -> _native.Matrix:
    """The matrix of ``form`` whose arrays, and what else is its own, are ``given``."""
    options: dict[str, Any] = {**form.options, **given}
    if group is not None:
        options |= {"group": group, "one_scale": form.scale_rows == 0}
    return _native.Matrix(form.kind, *shape, **options)


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
