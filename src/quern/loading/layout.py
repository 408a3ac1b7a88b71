"""Checkpoints whose parameters lie in other tensors than those of their names, seen as if they did not.

Experts come one by one, under several names, or stacked in one tensor. A part of a stack is a run of bytes, so it is read,
or mapped into memory, without the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from quern.architectures.base import Layout, Source
from quern.checkpoint.checkpoint import Checkpoint, TensorSource
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo, read_tensor
from quern.checkpoint.streaming.source import StreamSource


def relaid(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """``checkpoint``, whose tensors are those of ``layout``, with a tensor for each parameter."""
    if not layout.sources:
        return checkpoint
    return replace(checkpoint, source=RelaidSource(checkpoint.source, layout.sources))


@dataclass(frozen=True)
class RelaidSource:
    """The tensors of ``source`` under the names of parameters, stacks cut into theirs."""

    source: TensorSource
    parts: Mapping[str, Source]
    _kept: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Those of the source."""
        return self.source.weight_files

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor as it is read, and its place in its file."""
        stored = self.source.infos
        moved = {part.tensor for part in self.parts.values()}
        found = {name: info for name, info in stored.items() if name not in moved}
        return found | {name: _cut(stored[part.tensor], part) for name, part in self.parts.items()}

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.source.place(self._stored(name))

    def plain(self, name: str) -> bool:
        """Whether a tensor's bytes in its file are what ``read`` returns."""
        return self.source.plain(self._stored(name))

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory on the CPU. A stack is read as a whole only where it lies in no file, and is kept
        then until another one is asked for."""
        part = self.parts.get(name)
        if part is None or part == Source(part.tensor):
            return self.source.read(self._stored(name))
        if self.plain(name):
            return read_tensor(self.place(name), self.infos[name])
        if isinstance(self.source, StreamSource):
            return self.source.read_part(part.tensor, *_part(self.source.infos[part.tensor].shape, part))
        if part.tensor not in self._kept:
            self._kept.clear()
            self._kept[part.tensor] = self.source.read(part.tensor)
        return part.cut(self._kept[part.tensor]).clone()

    def _stored(self, name: str) -> str:
        return self.parts[name].tensor if name in self.parts else name


def _cut(info: TensorInfo, part: Source) -> TensorInfo:
    """What is said of a part: one of a stack, some rows, or both; it has no place where the source has none."""
    if part == Source(part.tensor):
        return info
    first, shape = _part(info.shape, part)
    size = DTYPES[info.dtype].itemsize if info.stored_bytes else 0
    begin = info.begin + size * first
    return TensorInfo(info.dtype, shape, begin, begin + size * prod(shape))


def _part(shape: tuple[int, ...], part: Source) -> tuple[int, tuple[int, ...]]:
    """Where a part of a tensor of ``shape`` begins, in numbers, and its shape."""
    first = 0
    if part.index is not None:
        shape, first = shape[1:], part.index * prod(shape[1:])
    if part.rows is not None:
        first += part.rows[0] * prod(shape[1:])
        shape = (part.rows[1] - part.rows[0], *shape[1:])
    return first, shape
