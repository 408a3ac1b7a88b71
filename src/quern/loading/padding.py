"""Zeros that make an odd intermediate size fit a format or a runtime, exactly, and their removal.

The further rows of gate and up are zero, so what the activation makes of them times what they are is zero, whatever the
further columns of down hold. An artifact keeps the larger size in config.json, and the model's own in its provenance::

    "padding": {"intermediate_size": [29568, 29696]}

Whoever asks for the model itself, and not for what is stored, opens it through ``unpadded``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quern.architectures.base import Architecture, Shapes, architecture_of
from quern.checkpoint.checkpoint import Checkpoint, TensorSource
from quern.checkpoint.files import read_json
from quern.checkpoint.safetensors_file import TensorInfo
from quern.core.artifact import PROVENANCE
from quern.core.errors import BadFileError, UserError
from quern.core.recipe_parts import Padding
from quern.core.text.language import gettext, translatable
from quern.formats.base import file_provenance

SIZE = "intermediate_size"
PADDED_ROLES = ("gate", "up", "down")
ZERO_ROLE = "up"
"""The linears whose further rows must be zero."""


@dataclass(frozen=True)
class ResizedSource:
    """The tensors of ``source``, some with zeros behind their rows or columns, or without what lies there."""

    source: TensorSource
    infos: Mapping[str, TensorInfo]
    """As they are read."""
    zero: Collection[str]
    """Those of which nothing but zeros may be cut off."""
    before: int
    """The intermediate size of the source."""

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Those of the source."""
        return self.source.weight_files

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.source.place(name)

    def plain(self, name: str) -> bool:
        """Whether a tensor's bytes in its file are what ``read`` returns."""
        return self._as_stored(name) and self.source.plain(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory on the CPU. Raises ``BadFileError`` where more than zeros would be lost."""
        tensor = self.source.read(name)
        if self._as_stored(name):
            return tensor
        shape = self.infos[name].shape
        both = tuple(slice(0, min(sizes)) for sizes in zip(tensor.shape, shape, strict=True))
        if name in self.zero and tensor[shape[0] :].any():
            raise BadFileError(
                self.place(name),
                gettext(
                    "tensor {name!r} has other numbers than zeros in the rows that {provenance} calls padding",
                    name=name,
                    provenance=PROVENANCE,
                ),
                gettext("The artifact was changed; quantize the model again"),
            )
        result = torch.zeros(shape, dtype=tensor.dtype)
        result[both] = tensor[both]
        return result

    def _as_stored(self, name: str) -> bool:
        return self.infos[name].shape == self.source.infos[name].shape


def padded(checkpoint: Checkpoint, padding: Padding | None) -> Checkpoint:
    """``checkpoint`` with an intermediate size that ``padding`` divides; itself where that is so already.

    Raises ``UserError`` for a family whose weights do not lie as the modules have them.
    """
    if padding is None:
        return checkpoint
    size = checkpoint.config.get(SIZE)
    if type(size) is not int:
        told = {"path": checkpoint.path, "size": SIZE}
        raise UserError(gettext("padding: the configuration of {path} has no {size}. Leave padding out", **told))
    wanted = -(-size // padding.intermediate) * padding.intermediate
    return checkpoint if wanted == size else replace(_resized(checkpoint, wanted), numbers=checkpoint.parameters)


def padding_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What provenance says of the zeros that ``padded`` added; empty where it added none."""
    source = checkpoint.source
    if not isinstance(source, ResizedSource) or source.before > checkpoint.config[SIZE]:
        return {}
    return {"padding": {SIZE: [source.before, checkpoint.config[SIZE]]}}


def unpadded(checkpoint: Checkpoint) -> Checkpoint:
    """A model with the sizes that it had before quern padded it; itself where quern did not.

    Raises ``BadFileError`` where provenance and configuration contradict each other.
    """
    size = original_size(checkpoint)
    return checkpoint if size is None else _resized(checkpoint, size)


def original_size(checkpoint: Checkpoint) -> int | None:
    """The intermediate size before padding, as the provenance of an artifact says it; None where nothing was padded."""
    if checkpoint.path.is_file():
        path, said = checkpoint.path, file_provenance(checkpoint.path)
    else:
        path = checkpoint.path / PROVENANCE
        said = read_json(path) if path.is_file() else None
    if said is None or (found := said.get("padding")) is None:
        return None
    sizes = found.get(SIZE) if isinstance(found, dict) else None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int for size in sizes):
        told = {"found": str(found)[:80], "size": SIZE}
        raise BadFileError(path, gettext("has padding {found!r}; it must be two numbers of {size}", **told), _AGAIN)
    before, after = int(sizes[0]), int(sizes[1])
    if not 0 < before < after or after != checkpoint.config.get(SIZE):
        raise BadFileError(
            path,
            gettext(
                "says that {size} {before} was padded to {after}; config.json says {found!r}",
                size=SIZE,
                before=before,
                after=after,
                found=checkpoint.config.get(SIZE),
            ),
            _AGAIN,
        )
    return before


_AGAIN = translatable("The artifact is damaged or belongs to another config.json; quantize the model again")


def padding_notes(checkpoint: Checkpoint) -> list[str]:
    """What whoever looks at a model should know where it is padded, or an artifact that was."""
    source = checkpoint.source
    before = source.before if isinstance(source, ResizedSource) else original_size(checkpoint)
    after = checkpoint.config.get(SIZE)
    if before is None or after is None or before >= after:
        return []
    return [
        gettext(
            "{size} {before} is stored as {after}: rows of gate and up and columns of down are padded with zeros",
            size=SIZE,
            before=before,
            after=after,
        )
    ]


def original_shapes(checkpoint: Checkpoint) -> Shapes:
    """Of the tensors that padding changed, the shapes that they have in the model; empty where nothing was padded."""
    size = original_size(checkpoint)
    if size is None:
        return {}
    shapes = _architecture({**checkpoint.config, SIZE: size}).module_shapes()
    return {name: shapes[name] for name in _changed(_architecture(checkpoint.config), shapes)}


def _architecture(config: Mapping[str, Any]) -> Architecture:
    return architecture_of({key: value for key, value in config.items() if key != "quantization_config"})


def _resized(checkpoint: Checkpoint, size: int) -> Checkpoint:
    config = {**checkpoint.config, SIZE: size}
    before, shapes = _architecture(checkpoint.config), _architecture(config).module_shapes()
    changed = _changed(before, shapes)
    infos = dict(checkpoint.source.infos)
    infos |= {name: replace(infos[name], shape=shapes[name]) for name in changed if name in infos}
    zero = {name for name in changed if _role(before, name) == ZERO_ROLE}
    return replace(
        checkpoint, config=config, source=ResizedSource(checkpoint.source, infos, zero, checkpoint.config[SIZE])
    )


def _changed(architecture: Architecture, shapes: Shapes) -> list[str]:
    """The tensors whose shape depends on the intermediate size. Raises ``UserError`` where zeros would do harm in one."""
    changed = [name for name, shape in architecture.module_shapes().items() if shapes.get(name) != shape]
    stacked = any(block.sources for block in architecture.blocks)
    if stacked or any(_role(architecture, name) not in PADDED_ROLES for name in changed):
        raise UserError(
            gettext(
                "padding knows gate, up and down as matrices of their own; weights of {type} lie otherwise. "
                "Leave padding out of the recipe",
                type=architecture.model_type,
            )
        )
    return changed


def _role(architecture: Architecture, name: str) -> str | None:
    spec = architecture.linears.get(name.rpartition(".")[0])
    return None if spec is None else spec.role
