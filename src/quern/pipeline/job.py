"""What the stages of one quantization share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.work_folder import WorkFolder
from quern.core.parallel import Workers
from quern.core.progress import Progress
from quern.core.recipe import Recipe, WeightScheme
from quern.formats.base import Format
from quern.quantization.calibration.activations import ActivationFile

LARGE = 10**9
"""From so many parameters on, ``compute_dtype: auto`` means bfloat16."""


@dataclass(frozen=True)
class Job:
    """One model, one recipe, one work folder."""

    checkpoint: Checkpoint
    architecture: Architecture
    recipe: Recipe
    format: Format
    sequences: Tensor | None
    """Calibration tokens, int64 ``(sequences, time)``; None where the recipe needs none."""
    seed: int
    work: WorkFolder
    workers: Workers
    progress: Progress
    device: torch.device
    notes: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Arithmetic of the calibration passes."""
        name = self.recipe.calibration.compute_dtype
        if name == "auto":
            name = "bfloat16" if self.checkpoint.parameters >= LARGE else "float32"
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def read(self, name: str) -> Tensor:
        """A checkpoint tensor on the job's device; NaN and infinities are refused."""
        return self.checkpoint.read(name, finite=True).to(self.device)

    def activations(self, kind: str, index: int) -> ActivationFile:
        """The file of hidden states that enter block ``index`` (``index`` = number of layers: leave the last one)."""
        assert self.sequences is not None
        count, time = self.sequences.shape
        path = self.work.path(kind, f"{index:04d}.bin")
        return ActivationFile(path, (count, time, self.architecture.config.hidden_size), self.compute_dtype)

    def artifact_path(self, *parts: str) -> Path:
        """A path inside the artifact while it is being made."""
        return self.work.path("artifact", *parts)

    def shard(self, position: int) -> str:
        """File name of a shard: 0 the embedding, 1 ... layers the blocks, layers + 1 the final norm and the head."""
        return f"model-{position + 1:05d}-of-{self.architecture.layers + 2:05d}.safetensors"


def quantized_modules(recipe: Recipe, architecture: Architecture) -> dict[str, WeightScheme]:
    """Every module that is stored as codes, by full name, with its scheme."""
    schemes = {}
    if recipe.embedding.quantized:
        schemes[architecture.embedding] = recipe.embedding
    if recipe.head.quantized and not architecture.tied:
        schemes[architecture.head] = recipe.head
    for name in decoder_linears(architecture):
        scheme = recipe.scheme_for(name)
        if scheme.quantized:
            schemes[name] = scheme
    return schemes


def decoder_linears(architecture: Architecture) -> list[str]:
    """The linears of all decoder blocks, by full name."""
    return [architecture.block_prefix(i) + name for i in range(architecture.layers) for name in architecture.linears()]
