"""Checkpoints of the Hub whose shards are on the disk only while they are in use.

A folder with ``config.json`` and ``stream.json`` is read as any checkpoint is; ``folder.py`` makes it. ``stream.json``::

    {"version": 1, "repository": "org/name", "revision": "0a3...", "shards": {NAME: {"size": 3950000000, "sha256": "..."}},
     "tensors": {NAME: {"shard": NAME, "dtype": "BF16", "shape": [8192, 8192]}}}

A shard of which the Hub names no SHA-256 (small ones in git) has ``git_sha1``. A shard is fetched when one of its tensors is
read, held to its hash, and deleted once two others were used; meanwhile the next one is fetched, in the direction of the
last two. So there are at most three on the disk. What a kill leaves of one is gone on from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quern.checkpoint.files import read_json
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo, read_header, read_tensor
from quern.checkpoint.streaming.hub_files import RemoteFile, fetch
from quern.core.errors import BadFileError, UserError

STREAM = "stream.json"
KEPT = 2
"""Shards that stay while others are used: a block may lie on two."""
_LIMIT = 100_000_000
_AGAIN = "Remove the folder; the same command makes it again"
_PLAIN = r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$"
Name = Annotated[str, Field(pattern=_PLAIN, max_length=200)]


class Shard(BaseModel):
    """What the Hub says of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: Annotated[int, Field(gt=0, le=2**44)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    git_sha1: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None

    @model_validator(mode="after")
    def _check(self) -> Shard:
        if (self.sha256 is None) == (self.git_sha1 is None):
            raise ValueError("a shard has one hash, sha256 or git_sha1")
        return self


class StreamedTensor(BaseModel):
    """Where a tensor is, and what it is read as."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shard: Name
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0, le=2**40)], ...]


class Manifest(BaseModel):
    """The content of ``stream.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    repository: str
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    shards: dict[Name, Shard]
    tensors: dict[str, StreamedTensor]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for name, tensor in self.tensors.items():
            if tensor.shard not in self.shards or tensor.dtype not in DTYPES:
                raise ValueError(f"tensor {name[:200]!r} is of an unknown shard or dtype")
        return self

    def remote(self, shard: str) -> RemoteFile:
        """What fetches a shard."""
        said = self.shards[shard]
        return RemoteFile(self.repository, self.revision, shard, said.size, said.sha256, said.git_sha1)


@dataclass(frozen=True)
class StreamSource:
    """The tensors of a folder with ``stream.json``."""

    path: Path
    manifest: Manifest
    shards: ShardFolder

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor; in no file that stays, so each begins and ends at 0."""
        return {name: TensorInfo(one.dtype, one.shape, 0, 0) for name, one in self.manifest.tensors.items()}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """What the weights depend on: it has the hashes of all shards."""
        return (self.path,)

    def place(self, name: str) -> Path:
        """The shard, which may not be there at the moment."""
        return self.path.with_name(self.manifest.tensors[name].shard)

    def plain(self, name: str) -> bool:
        """Never: no file that stays holds the numbers."""
        return False

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory on the CPU, its shard fetched if need be. Raises ``UserError`` where that fails,
        ``BadFileError`` for a shard that is not what the Hub says."""
        return self.read_part(name, 0, self.manifest.tensors[name].shape)

    def read_part(self, name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """As ``read``, the numbers of a tensor from the one at ``first`` on, as a tensor of ``shape``."""
        said = self.manifest.tensors[name]

        def read(path: Path) -> torch.Tensor:
            info = read_header(path).get(name)
            if info is None or (info.dtype, info.shape) != (said.dtype, said.shape):
                raise BadFileError(path, f"does not hold tensor {name!r} as its header on the Hub said", _AGAIN)
            size = DTYPES[info.dtype].itemsize
            begin = info.begin + size * first
            return read_tensor(path, TensorInfo(info.dtype, shape, begin, begin + size * prod(shape)))

        return self.shards.use(said.shard, read)


@dataclass
class ShardFolder:
    """The shards of a manifest, of which few are there."""

    folder: Path
    manifest: Manifest
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _used: list[str] = field(default_factory=list)
    """The last ones, the newest behind."""
    _ahead: tuple[str, threading.Thread] | None = None

    def use(self, shard: str, read: Callable[[Path], torch.Tensor]) -> torch.Tensor:
        """What ``read`` returns of a shard, which stays where it is meanwhile."""
        with self._lock:
            path = self.folder / shard
            if not path.is_file():
                if self._ahead is not None and self._ahead[0] == shard:
                    self._ahead[1].join()
                if not path.is_file():
                    fetch(self.manifest.remote(shard), self.folder)
            if self._used[-1:] != [shard]:
                before = self._used[-1] if self._used else None
                self._used = [*(other for other in self._used if other != shard), shard][-KEPT:]
                self._forget_others()
                self._fetch_ahead(before, shard)
            return read(path)

    def _forget_others(self) -> None:
        ahead = {self._ahead[0]} if self._ahead is not None and self._ahead[1].is_alive() else set()
        for shard in self.manifest.shards.keys() - ahead - set(self._used):
            (self.folder / shard).unlink(missing_ok=True)

    def _fetch_ahead(self, before: str | None, shard: str) -> None:
        """Begin with the shard that is likely to be next."""
        if self._ahead is not None and self._ahead[1].is_alive():
            return
        order = sorted(self.manifest.shards)
        place = order.index(shard)
        following = place + (-1 if before is not None and order.index(before) > place else 1)
        if not 0 <= following < len(order) or (self.folder / order[following]).is_file():
            return

        def quietly() -> None:
            with suppress(UserError):  # whoever needs the shard tries again, and tells
                fetch(self.manifest.remote(order[following]), self.folder)

        thread = threading.Thread(target=quietly, daemon=True)
        self._ahead = order[following], thread
        thread.start()

    def clear(self) -> None:
        """Delete all shards and what came of some."""
        if self._ahead is not None:
            self._ahead[1].join()
        for shard in self.manifest.shards:
            (self.folder / shard).unlink(missing_ok=True)
            self.manifest.remote(shard).part(self.folder).unlink(missing_ok=True)


def open_stream(folder: Path) -> StreamSource:
    """The tensors that ``stream.json`` of a folder names. Raises ``BadFileError``."""
    path = folder / STREAM
    try:
        manifest = Manifest.model_validate(read_json(path, _LIMIT))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadFileError(path, f"has at {'.'.join(map(str, first['loc']))[:200]}: {first['msg']}", _AGAIN) from None
    return StreamSource(path, manifest, ShardFolder(folder, manifest))
