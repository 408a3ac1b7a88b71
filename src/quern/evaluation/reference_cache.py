"""The unquantized model's logits on disk, computed once and read by every contender.

A folder per key: ``key.json`` (everything that the logits depend on), ``files.json`` (SHA-256 of each window's file)
and ``00000.npy`` and so on, one float32 array ``(scored tokens, vocabulary)`` for each window. The folder appears under
its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.files import explain_write_errors, read_json, room_advice
from quern.core.errors import BadFileError, UserError, option
from quern.core.results import METRICS_VERSION
from quern.core.text.units import bytes_text

_KEY, _FILES = "key.json", "files.json"


@dataclass(frozen=True, kw_only=True)
class ReferenceKey:
    """Everything that reference logits depend on."""

    model_sha256: str
    texts_sha256: tuple[str, ...]
    windows_sha256: str
    """Hash of the token ids: texts, tokenizer, number of tokens and window in one."""
    tokens: int
    window: int
    dtype: str
    """Arithmetic of the pass, ``float32``."""
    engine: str
    metrics_version: int = METRICS_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``key.json`` holds it."""
        return {**dataclasses.asdict(self), "texts_sha256": list(self.texts_sha256)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReferenceKey:
        """The key that ``to_json`` wrote."""
        return cls(**{**data, "texts_sha256": tuple(data["texts_sha256"])})

    def folder(self, cache: Path) -> Path:
        """Where in ``cache`` logits under this key lie."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return cache / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


class ReferenceLogits:
    """Cached logits, open for reading. Raises ``BadFileError`` for a cache that does not hold what its key says."""

    def __init__(self, cache: Path, key: ReferenceKey) -> None:
        self.path = key.folder(cache)
        self._advice = f"Remove {self.path} and run again"
        if read_json(self.path / _KEY) != key.to_json():
            raise BadFileError(self.path / _KEY, "is not the key that is asked for", self._advice)
        hashes = read_json(self.path / _FILES)
        self._hashes = [str(hashes[name]) for name in sorted(hashes)]

    def __len__(self) -> int:
        return len(self._hashes)

    def window(self, number: int) -> NDArray[np.float32]:
        """Logits ``(scored tokens, vocabulary)`` of one window."""
        path = self.path / _name(number)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise BadFileError(path, f"cannot be read: {error.strerror}", self._advice) from None
        if hashlib.sha256(raw).hexdigest() != self._hashes[number]:
            raise BadFileError(path, "has other bytes than were written", self._advice)
        logits: NDArray[np.float32] = np.load(io.BytesIO(raw), allow_pickle=False)
        return logits


class ReferenceWriter:
    """Fills a cache folder; a context manager that puts it in its place if the block ends without an error."""

    def __init__(self, cache: Path, key: ReferenceKey, *, scored: int, vocabulary_size: int) -> None:
        self._final = key.folder(cache)
        self._folder = cache / f".{self._final.name}.tmp"
        self._key = key
        self._needed = _bytes(scored, vocabulary_size)
        self._hashes: dict[str, str] = {}

    def __enter__(self) -> ReferenceWriter:
        with explain_write_errors(self._folder, self._needed):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            _check_room(self._folder.parent, self._needed)
            self._folder.mkdir()
        return self

    def add(self, number: int, logits: NDArray[np.float32]) -> None:
        """Store one window's logits ``(scored tokens, vocabulary)``."""
        buffer = io.BytesIO()
        np.save(buffer, logits.astype(np.float32, copy=False), allow_pickle=False)
        with explain_write_errors(self._folder / _name(number), self._needed):
            (self._folder / _name(number)).write_bytes(buffer.getbuffer())
        self._hashes[_name(number)] = hashlib.sha256(buffer.getbuffer()).hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with explain_write_errors(self._final, self._needed):
                (self._folder / _FILES).write_text(json.dumps(self._hashes, indent=2, sort_keys=True), "utf-8")
                (self._folder / _KEY).write_text(json.dumps(self._key.to_json(), indent=2), "utf-8")
                shutil.rmtree(self._final, ignore_errors=True)
                os.replace(self._folder, self._final)
        shutil.rmtree(self._folder, ignore_errors=True)


def check_reference_room(cache: Path, key: ReferenceKey, *, scored: int, vocabulary_size: int) -> None:
    """Raise ``UserError`` where the logits under ``key`` are still to be computed and the disk is too full for them."""
    if not has_reference(cache, key):
        _check_room(cache, _bytes(scored, vocabulary_size))


def _bytes(scored: int, vocabulary_size: int) -> int:
    return scored * vocabulary_size * np.dtype(np.float32).itemsize


def _check_room(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"the reference logits need {bytes_text(needed)} in {folder}, {bytes_text(free)} are free. Score fewer tokens "
            f"({option('tokens', '--tokens')}). {room_advice(folder)}"
        )


def has_reference(cache: Path, key: ReferenceKey) -> bool:
    """Whether complete logits under ``key`` are in the cache."""
    return (key.folder(cache) / _KEY).is_file()


def _name(number: int) -> str:
    return f"{number:05d}.npy"
