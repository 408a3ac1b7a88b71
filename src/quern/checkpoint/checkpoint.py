"""A checkpoint: the configuration and the lazily read weights of one model, whatever it lies in.

MODEL is a Hugging Face folder, a Hub id (``hub.py``) or a GGUF file (``gguf/``). Nothing here runs code from a
checkpoint: only JSON, safetensors and GGUF are read, pickles are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from quern.checkpoint.counts import check_counts
from quern.checkpoint.files import sha256_into
from quern.checkpoint.folder import CONFIG, INDEX, OpenContainer, no_container, open_folder
from quern.checkpoint.head import EMBEDDING, HEAD, with_true_head
from quern.checkpoint.hub import download, is_hub_id
from quern.checkpoint.safetensors_file import TensorInfo
from quern.checkpoint.strangers import cached_snapshot, single_file
from quern.checkpoint.streaming.source import StreamSource
from quern.checkpoint.synthetic import SyntheticSource
from quern.checkpoint.tokenizer import tokenizer_files
from quern.checkpoint.unchanged import Stamp, check_unchanged, stamps_of
from quern.core.errors import BadFileError, UserError
from quern.core.progress import Progress, Silent
from quern.core.text.language import gettext, translatable

_CHUNK = 1 << 22
_ALLOWED = translatable(
    "Give a Hugging Face folder (config.json and *.safetensors), a Hub id such as Qwen/Qwen2.5-0.5B, or a .gguf file"
)


class TensorSource(Protocol):
    """Where the tensors of a checkpoint come from."""

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Files that hold tensors, sorted by name."""
        ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's dtype and shape as ``read`` returns it, and its place in its file."""
        ...

    def place(self, name: str) -> Path:
        """The file that holds a tensor, between its info's ``begin`` and ``end``."""
        ...

    def plain(self, name: str) -> bool:
        """Whether a tensor's bytes in its file are what ``read`` returns."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory on the CPU."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """One model's configuration and weights. Tensors are read when asked for and not kept."""

    path: Path
    """The folder or the GGUF file; of several, the first one."""
    config: dict[str, Any]
    """What ``config.json`` says (or what a GGUF's metadata amounts to)."""
    source: TensorSource
    notes: tuple[str, ...] = field(default=())
    """What whoever measures or quantizes the model should know of it."""
    lasting_notes: tuple[str, ...] = field(default=())
    """Those of them that hold for whatever is made from the model too."""
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    """Of its files when they were opened; one that changes is read no more."""
    hashed: dict[str, str] = field(default_factory=dict, compare=False)
    """Once ``sha256`` was asked for: by file, in order, the digest of everything up to its end."""
    numbers: int | None = None
    """How many the model has, where the source has others besides; None: those of the source."""

    @property
    def model_type(self) -> str:
        """The architecture's name, for instance ``qwen2``."""
        return str(self.config["model_type"])

    def names(self) -> list[str]:
        """Names of all stored tensors, sorted."""
        return sorted(self.source.infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises ``BadFileError`` for one that the checkpoint lacks."""
        if name not in self.source.infos:
            raise BadFileError(
                self.path,
                gettext("has no tensor {name!r}", name=name),
                gettext("Check that config.json belongs to these weights"),
            )
        return self.source.infos[name]

    def read(self, name: str, *, finite: bool = False) -> torch.Tensor:
        """The tensor called ``name``, as stored, in fresh memory on the CPU.

        With ``finite`` a tensor that holds NaN or infinity is refused. Raises ``BadFileError``.
        """
        self.info(name)
        place = self.source.place(name)
        check_unchanged(place, self.stamps)
        tensor = self.source.read(name)
        check_unchanged(place, self.stamps)
        if finite and (count := count_non_finite(tensor)):
            raise BadFileError(
                place,
                gettext(
                    "tensor {name!r} holds {count} NaN or infinite values among {all}",
                    name=name,
                    count=count,
                    all=tensor.numel(),
                ),
                gettext("The weights are damaged or overflowed their dtype; get the checkpoint again"),
            )
        return tensor

    @property
    def at_hand(self) -> bool:
        """Whether its weights lie in files; others are drawn from a seed or fetched when they are read."""
        source: Any = self.source
        while (inner := getattr(source, "source", None)) is not None:
            source = inner
        return not isinstance(source, SyntheticSource | StreamSource)

    @cached_property
    def parameters(self) -> int:
        """Stored numbers; a head that is tied to the embedding counts once even where it is stored twice."""
        if self.numbers is not None:
            return self.numbers
        return sum(info.elements for name, info in self.source.infos.items() if not self._repeats_embedding(name))

    def _repeats_embedding(self, name: str) -> bool:
        return self.config.get("tie_word_embeddings") is True and name == HEAD and EMBEDDING in self.source.infos

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Files that make up the checkpoint: configuration, weights and tokenizer."""
        if self.path.is_file():
            return self.source.weight_files
        extra = [self.path / name for name in (CONFIG, INDEX) if (self.path / name).is_file()]
        return tuple(sorted({*extra, *self.source.weight_files, *tokenizer_files(self.path)}))

    @cached_property
    def bf16_bytes(self) -> int:
        """Bytes of all ``files`` if each parameter took two bytes: the size that compression is measured against."""
        sizes = sum(path.stat().st_size for path in self.files)
        tensors = sum(info.stored_bytes for info in self.source.infos.values())
        return sizes - tensors + 2 * self.parameters

    def sha256(self, progress: Progress | None = None) -> str:
        """Hexadecimal SHA-256 over name, size and bytes of the configuration and each weight file, sorted by name."""
        config = [] if self.path.is_file() else [self.path / CONFIG]
        paths = sorted({*config, *self.source.weight_files})
        task = (progress or Silent()).task("hashing the checkpoint", sum(path.stat().st_size for path in paths))
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            sha256_into(digest, path, advance=task.advance)
            self.hashed[path.name] = digest.hexdigest()
        task.done()
        return digest.hexdigest()


def count_non_finite(tensor: torch.Tensor) -> int:
    """How many values of a tensor are NaN or infinite; memory for a few million values only."""
    if not tensor.is_floating_point():
        return 0
    flat = tensor.reshape(-1)
    pieces = (flat[begin : begin + _CHUNK] for begin in range(0, flat.numel(), _CHUNK))
    # float8 knows no isfinite; a float64 must not overflow to infinity on the way.
    wide = (piece.float() if piece.element_size() == 1 else piece for piece in pieces)
    return sum(int(piece.numel() - piece.isfinite().sum()) for piece in wide)


def open_checkpoint(
    model: str | Path, *, progress: Progress | None = None, open_container: OpenContainer = no_container
) -> Checkpoint:
    """Open a folder, a Hub id (downloaded if need be) or a GGUF file. Raises ``UserError`` or ``BadFileError``.

    ``open_container`` opens folders whose tensors lie in files of another kind than safetensors (see ``open_folder``).
    Headers are read and checked, weights are not read yet. Whether the tensors are those that the configuration calls for
    is checked by ``quern.loading``, which everything that uses a model's weights goes through.
    """
    text = str(model)
    if not text.strip():
        raise UserError(gettext("MODEL is empty. {allowed}", allowed=gettext(_ALLOWED)))
    path = Path(model)
    if path.is_file():
        return _checked(_open_file(path))
    if path.is_dir() and (snapshot := cached_snapshot(path)) is not None:
        path = snapshot
    if not path.is_dir():
        if not is_hub_id(text):
            problem = gettext("is neither a folder nor a regular file") if path.exists() else gettext("does not exist")
            raise UserError(
                gettext("MODEL {text!r} {problem}. {allowed}", text=text, problem=problem, allowed=gettext(_ALLOWED))
            )
        path = download(text, progress or Silent())
    return _checked(Checkpoint(path, *open_folder(path, open_container)))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The same, to be held to its files, unless its configuration counts what no model has."""
    checkpoint = replace(checkpoint, stamps=stamps_of(checkpoint.source.weight_files))
    config, tensors = checkpoint.config, len(checkpoint.source.infos)
    check_counts(checkpoint.path, config)
    if config.get("num_hidden_layers", 1) > tensors:
        raise BadFileError(
            checkpoint.path,
            gettext(
                "its configuration has {layers} layers, its weights {tensors} tensors",
                layers=config["num_hidden_layers"],
                tensors=tensors,
            ),
            gettext("Check that config.json belongs to these weights"),
        )
    return with_true_head(checkpoint)


def _open_file(path: Path) -> Checkpoint:
    if path.suffix.lower() == ".gguf":
        from quern.checkpoint.gguf.file import open_gguf, rounding_note

        config, source = open_gguf(path)
        note = rounding_note(source)
        return Checkpoint(source.weight_files[0], config, source, (note,) if note else ())
    raise single_file(path, _ALLOWED)
