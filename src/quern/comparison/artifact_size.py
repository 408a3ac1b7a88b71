"""What lies on the disk of a contender: its bytes, counted by one rule whoever wrote them.

``bytes`` are all files of an artifact's folder: weights, configuration, tokenizer. ``weight_bytes`` are tensor data alone,
embeddings included: codes, scales, zero points and everything that stayed as it was. They are read from the files' own
headers; where a format has none that is simple to read, the file of raw data counts whole.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import sha256_into
from quern.checkpoint.gguf.header import read_gguf_header
from quern.checkpoint.safetensors_file import DTYPES, read_header
from quern.core.errors import BadFileError
from quern.core.progress import Progress
from quern.core.text.units import bytes_text
from quern.loading.fitting import open_any

_RAW = (".bin", ".onnx", ".data", ".onnx_data", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class ArtifactSize:
    """What an artifact, or an unquantized checkpoint, takes on the disk, and what it is."""

    path: Path
    sha256: str
    bytes: int
    weight_bytes: int
    loaded_bytes: int
    """Of the same tensors in memory, as they are read."""
    config: Mapping[str, Any]
    """``config.json``; empty for other tools' artifacts."""

    @property
    def vocabulary(self) -> int | None:
        """Its ``vocab_size``, where there is a configuration."""
        return self.config.get("vocab_size")


def stored_checkpoint(path: str | Path, sha256: str | None = None, progress: Progress | None = None) -> ArtifactSize:
    """A checkpoint or an artifact of quern's."""
    checkpoint = open_any(path, progress=progress)
    return ArtifactSize(
        path=checkpoint.path,
        sha256=sha256 or checkpoint.sha256(progress),
        bytes=artifact_bytes(checkpoint),
        weight_bytes=weight_bytes(checkpoint),
        loaded_bytes=loaded_bytes(checkpoint),
        config=checkpoint.config,
    )


def stored_folder(folder: Path, sha256: str | None = None) -> ArtifactSize:
    """Another tool's artifact. Raises ``BadFileError`` for a folder without weights."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = sum(file_weight_bytes(path) for path in files)
    if weights == 0:
        raise BadFileError(folder, "holds no weights: the tool wrote nothing that can be run")
    return ArtifactSize(
        path=folder,
        sha256=sha256 or folder_sha256(folder),
        bytes=sum(path.stat().st_size for path in files),
        weight_bytes=weights,
        loaded_bytes=weights,
        config={},
    )


def artifact_bytes(checkpoint: Checkpoint) -> int:
    """All files in an artifact's folder; of an unquantized checkpoint those that belong to it.

    A downloaded checkpoint may lie among other formats of the same weights; an artifact is all that was written.
    """
    if checkpoint.path.is_file() or "quantization_config" not in checkpoint.config:
        return sum(path.stat().st_size for path in checkpoint.files)
    return sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of tensor data: codes, scales, zero points and everything unquantized, without file headers."""
    return sum(checkpoint.info(name).stored_bytes for name in checkpoint.names())


def loaded_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors in memory, as they are read: more than on the disk where they are coded there."""
    infos = (checkpoint.info(name) for name in checkpoint.names())
    return sum(info.elements * DTYPES[info.dtype].itemsize for info in infos)


def source_notes(checkpoint: Checkpoint, size: int) -> list[str]:
    """How the artifact compares with a source that is smaller than its weights in bf16."""
    source = sum(path.stat().st_size for path in checkpoint.files)
    if source >= checkpoint.bf16_bytes:
        return []
    change = f"smaller by {1 - size / source:.1%}" if size <= source else f"larger by {size / source - 1:.1%}"
    return [
        f"the source takes {bytes_text(source)} on disk; the artifact is {change} than that ({bytes_text(size)}). "
        f"Compression is measured against the weights in bf16 ({bytes_text(checkpoint.bf16_bytes)})"
    ]


def file_weight_bytes(path: Path) -> int:
    """Bytes of tensor data in one file of any tool; 0 for files that hold none."""
    if path.suffix == ".safetensors":
        return sum(info.stored_bytes for info in read_header(path).values())
    if path.suffix == ".gguf":
        return sum(tensor.end - tensor.begin for tensor in read_gguf_header(path).tensors.values())
    if path.suffix not in _RAW and not path.name.endswith(".onnx.data"):
        return 0
    if zipfile.is_zipfile(path):  # torch.save: a tensor's data is a member below data/
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    return path.stat().st_size


def folder_sha256(folder: Path) -> str:
    """Over names, sizes and contents of all files below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        sha256_into(digest, path)
    return digest.hexdigest()
