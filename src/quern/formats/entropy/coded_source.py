"""A folder of which some tensors are entropy-coded: whoever reads it sees the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from quern.checkpoint.checkpoint import TensorSource
from quern.checkpoint.files import InputFile
from quern.checkpoint.safetensors_file import TensorInfo
from quern.core.errors import BadFileError
from quern.core.machine.parallel import Workers
from quern.formats.entropy.entropy import CodedTensor
from quern.formats.entropy.symbols import Coding, entropy_bits, parse_coding

CODER = "zstd"
"""The one coder that there is."""


def storage_json(codings: Mapping[str, Coding]) -> dict[str, object]:
    """What ``quantization_config`` says of coded tensors; ``parse_storage`` reads it back."""
    return {"coder": CODER, "tensors": {name: coding.to_json() for name, coding in sorted(codings.items())}}


def parse_storage(values: object) -> dict[str, Coding]:
    """The coded tensors by name. Raises ``ValueError``."""
    if not isinstance(values, dict) or set(values) != {"coder", "tensors"} or not isinstance(values["tensors"], dict):
        raise ValueError("storage is not described by exactly coder and tensors")
    if values["coder"] != CODER:
        raise ValueError(f"tensors are coded by {str(values['coder'])[:40]!r}; this quern decodes {CODER}")
    found = {}
    for name, described in values["tensors"].items():
        try:
            found[name] = parse_coding(described)
        except ValueError as error:
            raise ValueError(f"of coded tensor {name[:200]!r}: {error}") from None
    return found


@dataclass(frozen=True)
class CodedSource:
    """Tensors of a folder, coded ones decoded as they are read; a ``TensorSource``."""

    source: TensorSource
    """The folder as its safetensors files describe it."""
    codings: Mapping[str, Coding]

    def __post_init__(self) -> None:
        """Raise ``BadFileError`` for a coded tensor that is not there, or is no row of bytes."""
        for name in self.codings:
            info = self.source.infos.get(name)
            if info is None or info.dtype != "U8" or len(info.shape) != 1:
                folder = self.source.weight_files[0].parent
                what = "is missing" if info is None else f"is stored as {info.dtype} {info.shape}, not as a row of U8"
                raise BadFileError(
                    folder, f"coded tensor {name[:200]!r} {what}", "Get the artifact's files again, or quantize again"
                )

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return self.source.weight_files

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtypes and shapes of the tensors; places of their coded bytes."""
        coded = {
            name: replace(self.source.infos[name], dtype=coding.dtype, shape=coding.shape)
            for name, coding in self.codings.items()
        }
        return {**self.source.infos, **coded}

    def place(self, name: str) -> Path:
        return self.source.place(name)

    def plain(self, name: str) -> bool:
        return name not in self.codings and self.source.plain(name)

    def read(self, name: str) -> Tensor:
        if name not in self.codings:
            return self.source.read(name)
        with InputFile(self.place(name)) as file, _workers(self.codings[name]) as workers:
            return self._coded(file, name).read(workers)

    def entropy(self, name: str, bits: int) -> float:
        """Order-0 entropy in bits of all codes, of ``bits`` bits each, of a coded tensor; of its planes' bytes where it
        has several. Decodes it. Raises ``BadFileError``."""
        coding = self.codings[name]
        with InputFile(self.place(name)) as file, _workers(coding) as workers:
            counts = self._coded(file, name).counts(workers)
        return entropy_bits(counts, coding.width, bits if coding.planes == 1 else 8)

    def _coded(self, file: InputFile, name: str) -> CodedTensor:
        return CodedTensor(file, name, self.source.infos[name], self.codings[name])


def _workers(coding: Coding) -> AbstractContextManager[Workers]:
    """As many threads as there are processors, one where there is nothing to share."""
    return closing(Workers(None if coding.size > coding.chunk_bytes else 1))
