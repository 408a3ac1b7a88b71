"""What the stages of one quantization share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.work_folder import WorkFolder
from quern.core.machine.parallel import Workers
from quern.core.plan import Plan, make_plan
from quern.core.progress import Progress
from quern.core.recipe import Recipe
from quern.formats.base import ArtifactWriter
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.rounding.base import ROUNDINGS

LARGE = 10**9
"""From so many parameters on, ``compute_dtype: auto`` means bfloat16."""


@dataclass(frozen=True)
class Job:
    """One model, one recipe, one work folder."""

    checkpoint: Checkpoint
    architecture: Architecture
    recipe: Recipe
    plan: Plan
    writer: ArtifactWriter
    sequences: Tensor | None
    """Calibration tokens, int64 ``(sequences, time)``; None where the recipe needs none."""
    seed: int
    work: WorkFolder
    workers: Workers
    progress: Progress
    device: torch.device

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

    @property
    def uses_hessians(self) -> bool:
        """Whether a rounding of the plan reads Hessians."""
        return uses_hessians(self.plan)


def uses_hessians(plan: Plan) -> bool:
    """Whether the rounding of a matrix reads its Hessian."""
    return any(ROUNDINGS.get(linear.rounding.method).needs_hessian for linear in plan.quantized().values())


def plan_of(recipe: Recipe, architecture: Architecture) -> Plan:
    """What ``recipe`` makes of every matrix of a model."""
    head = None if architecture.tied else architecture.head
    return make_plan(recipe, architecture.linears, architecture.embedding, head)
