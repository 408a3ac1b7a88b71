"""Which output head a checkpoint has. The rules are those of transformers 5:

- tied to the embedding by the configuration and not stored, or stored with the same bytes: it is the embedding
- tied by the configuration, but stored with other values: the stored head is used, and a note says so
- tied, and only the head is stored (some tools write one of two equal tensors): it is the embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quern.checkpoint.files import InputFile

if TYPE_CHECKING:
    from quern.checkpoint.checkpoint import Checkpoint, TensorSource
    from quern.checkpoint.safetensors_file import TensorInfo

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
UNTIED = (
    "config.json ties the output head to the embedding, but another head is stored: the stored one is used, as "
    "transformers does"
)
_CHUNK = 1 << 22


def with_true_head(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with a configuration that says of the head what is true of the tensors."""
    infos = checkpoint.source.infos
    if checkpoint.config.get("tie_word_embeddings") is not True or HEAD not in infos:
        return checkpoint
    if EMBEDDING in infos:
        if _same_bytes(checkpoint.source):
            return checkpoint
        config = {**checkpoint.config, "tie_word_embeddings": False}
        return replace(checkpoint, config=config, notes=(*checkpoint.notes, UNTIED))
    if any(name.startswith("model.embed_tokens.") for name in infos):  # quantized: the head is one too many
        return checkpoint
    return replace(checkpoint, source=_HeadAsEmbedding(checkpoint.source))


def _same_bytes(source: TensorSource) -> bool:
    """Whether head and embedding are stored with the same dtype, shape and bytes, or decode to the same numbers."""
    first, second = source.infos[HEAD], source.infos[EMBEDDING]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if not (source.plain(HEAD) and source.plain(EMBEDDING)):
        return torch.equal(source.read(HEAD), source.read(EMBEDDING))
    with InputFile(source.place(HEAD)) as one, InputFile(source.place(EMBEDDING)) as other:
        for offset in range(0, first.stored_bytes, _CHUNK):
            count = min(_CHUNK, first.stored_bytes - offset)
            if one.read(first.begin + offset, count) != other.read(second.begin + offset, count):
                return False
    return True


@dataclass(frozen=True)
class _HeadAsEmbedding:
    """A source whose head is called the embedding."""

    source: TensorSource

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return self.source.weight_files

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {EMBEDDING if name == HEAD else name: info for name, info in self.source.infos.items()}

    def place(self, name: str) -> Path:
        return self.source.place(_stored(name))

    def plain(self, name: str) -> bool:
        return self.source.plain(_stored(name))

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(_stored(name))


def _stored(name: str) -> str:
    return HEAD if name == EMBEDDING else name
