"""A checkpoint that another tool quantized, as one whose packed weights are decoded when they are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quern.checkpoint.checkpoint import Checkpoint, TensorSource
from quern.checkpoint.foreign.base import FOREIGN, ForeignMethod, ForeignWeight, Stored
from quern.checkpoint.head import with_true_head
from quern.checkpoint.safetensors_file import TensorInfo
from quern.core.artifact import quantization_of
from quern.core.errors import BadFileError

QUANTIZATION = "quantization_config"


@dataclass(frozen=True, slots=True)
class DecodedInfo(TensorInfo):
    """A decoded weight. ``begin`` and ``end`` are the place of its codes."""

    all_bytes: int
    """Of all its parts in the files."""

    @property
    def stored_bytes(self) -> int:
        return self.all_bytes


@dataclass(frozen=True)
class DecodedSource:
    """The tensors of a model, decoded; those that nobody packed are read as they are."""

    stored: TensorSource
    method: ForeignMethod
    weights: Mapping[str, ForeignWeight]
    """Every weight that is packed, by its own name."""
    infos: Mapping[str, TensorInfo]

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files of all parts."""
        return self.stored.weight_files

    def place(self, name: str) -> Path:
        """The file that holds a tensor, or the codes of a weight."""
        return self.stored.place(self.weights[name].parts[0] if name in self.weights else name)

    def plain(self, name: str) -> bool:
        """Whether a tensor's bytes in its file are its numbers in their order."""
        return name not in self.weights and self.stored.plain(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory on the CPU."""
        return self.method.decode(self.weights[name]) if name in self.weights else self.stored.read(name)


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with the decoded weights in place of packed ones, and without its ``quantization_config``.

    One that is not quantized, or by a method that nobody here reads, is returned as it is. Headers and a few small
    tensors are read. Raises ``BadFileError`` where tensors and configuration contradict each other, ``UserError`` for
    a variant that is not read.
    """
    quantization = quantization_of(checkpoint.config)
    method = None if quantization is None else quantization.get("quant_method")
    if quantization is None or method not in FOREIGN.names():
        return checkpoint
    reader = FOREIGN.get(str(method))(quantization, Stored(checkpoint.path, checkpoint.source))
    weights: dict[str, ForeignWeight] = {}
    for weight in reader.weights():
        _check_names(checkpoint, weights, weight)
        weights[weight.name] = weight
    if not weights:
        raise BadFileError(
            checkpoint.path,
            f"config.json says that it is quantized by {method}, but no weight is packed as {reader.tool} does",
            "Get config.json and the weights from the same place again",
        )  # fmt: skip
    config = {key: value for key, value in checkpoint.config.items() if key != QUANTIZATION}
    source = DecodedSource(checkpoint.source, reader, weights, _infos(checkpoint.source, weights))
    lasting = (_note(reader, weights), *reader.notes())
    notes = (*checkpoint.notes, *lasting)
    return with_true_head(replace(checkpoint, config=config, source=source, notes=notes, lasting_notes=lasting))


def _check_names(checkpoint: Checkpoint, weights: Mapping[str, ForeignWeight], weight: ForeignWeight) -> None:
    if weight.name in weights or (weight.name in checkpoint.source.infos and weight.name not in weight.parts):
        raise BadFileError(
            checkpoint.source.place(weight.parts[0]), f"holds {weight.name!r} more than once: packed and otherwise",
            "Get the files again; one of them belongs to another checkpoint",
        )  # fmt: skip


def _infos(source: TensorSource, weights: Mapping[str, ForeignWeight]) -> dict[str, TensorInfo]:
    infos = source.infos
    parts = {part for weight in weights.values() for part in weight.parts}
    result = {name: info for name, info in infos.items() if name not in parts}
    for name, weight in weights.items():
        codes = infos[weight.parts[0]]
        stored = sum(infos[part].stored_bytes for part in weight.parts)
        result[name] = DecodedInfo(weight.dtype, weight.shape, codes.begin, codes.end, stored)
    return result


def _note(method: ForeignMethod, weights: Mapping[str, ForeignWeight]) -> str:
    kinds = sorted({(weight.bits, weight.granularity) for weight in weights.values()})
    said = ", ".join(f"{bits} bits by {granularity}" for bits, granularity in kinds[:4])
    return (
        f"the weights were quantized before, by {method.tool} ({said}), and are used as the values that its codes stand "
        "for: what that cost stays and is not measured, because losses are measured against these weights"
    )


def foreign_weights(checkpoint: Checkpoint) -> Mapping[str, ForeignWeight]:
    """The packed weights of a checkpoint that ``decoded`` returned, by name; none of any other."""
    source: Any = checkpoint.source
    while source is not None and not isinstance(source, DecodedSource):
        source = getattr(source, "source", None)
    return {} if source is None else source.weights


def without(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """A checkpoint that ``decoded`` returned, without some tensors that nobody packed."""
    source = checkpoint.source
    if not names or not isinstance(source, DecodedSource):
        return checkpoint
    infos = {name: info for name, info in source.infos.items() if name not in names}
    return replace(checkpoint, source=replace(source, infos=infos))
