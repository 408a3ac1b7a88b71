"""What the stages of one quantization share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quern.architectures.base import Architecture, parameter_reader
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.codecs.base import codec_of
from quern.core.machine.parallel import Workers
from quern.core.plan import LinearPlan, Plan, candidates_for, make_plan
from quern.core.progress import Progress
from quern.core.recipe import Recipe
from quern.core.scheme import CodecScheme
from quern.core.text.scheme_text import scheme_text
from quern.formats.base import ArtifactWriter
from quern.formats.mixes.base import settled
from quern.quantization.block import about
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.rounding.base import ROUNDINGS

OnUnhealthy = Literal["stop", "repair", "warn"]
LARGE = 10**9
"""From so many parameters on, ``compute_dtype: auto`` means bfloat16, unless weights are to keep their values."""


HESSIANS = 2 << 30
"""``Job.hessian_bytes`` where no cap of memory says less: each batch of experts is a pass of the calibration tokens."""


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
    on_unhealthy: OnUnhealthy = "stop"
    """What becomes of a block that is not fit for use (``gate.py``)."""
    hessian_bytes: int = HESSIANS
    """Most that the Hessians of experts take together, where each takes less."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Arithmetic of the calibration passes."""
        name = self.recipe.calibration.compute_dtype
        if name == "auto":
            large = self.checkpoint.parameters >= LARGE and not keeping(self.plan)
            name = "bfloat16" if large else "float32"
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

    @property
    def follows_drift(self) -> bool:
        """Whether a rounding of the plan makes up for drift."""
        return any(linear.rounding.target == "drift" for linear in self.plan.quantized().values())

    @property
    def follows_stream(self) -> bool:
        """Whether the calibration tokens go through the unquantized model too, beside the other."""
        return self.follows_drift or self.recipe.tuning is not None

    @property
    def two_sided(self) -> bool:
        """Whether a rounding of the plan counts gradients at outputs."""
        return any(linear.rounding.two_sided for linear in self.plan.quantized().values())


def uses_hessians(plan: Plan) -> bool:
    """Whether the rounding of a matrix reads its Hessian."""
    return any(ROUNDINGS.get(linear.rounding.method).needs_hessian for linear in plan.quantized().values())


def keeping(plan: Plan) -> list[str]:
    """The matrices whose rounding keeps the values that they have, by full name."""
    return [name for name, one in plan.quantized().items() if ROUNDINGS.get(one.rounding.method).keeps_values]


def check_kept(checkpoint: Checkpoint, architecture: Architecture, plan: Plan) -> None:
    """Raise ``UserError`` where weights that are to keep their values cannot: of the first block that has any, some rows of
    each. It is asked before any work is done; what the other blocks hold shows when they are rounded."""
    kept = set(keeping(plan))
    read = parameter_reader(lambda name: checkpoint.read(name, finite=True))
    for block in architecture.blocks:
        found = [linear.name for linear in block.linears if block.prefix + linear.name in kept]
        for name in found:
            own = plan[block.prefix + name]
            rounding, codec = ROUNDINGS.get(own.rounding.method)(own.rounding), codec_of(own.scheme)
            weight = read(block.sources_of(f"{name}.weight")).float()
            with about(block.prefix + name):
                rounding.round_slab(weight[: rounding.slab_height(len(weight), codec)], weight, codec, None)
        if found:
            return


def kept_note(plan: Plan) -> list[str]:
    """What whoever uses the artifact should know of weights that kept their values."""
    count = len(keeping(plan))
    if not count:
        return []
    return [f"{count} linears have exactly the values that the checkpoint's have: taken over, not rounded again"]


def plan_of(recipe: Recipe, architecture: Architecture) -> Plan:
    """What ``recipe`` makes of every matrix of a model."""
    asked, shapes = _asked(recipe, architecture), architecture.module_shapes()
    known: dict[tuple[CodecScheme, tuple[int, ...]], CodecScheme] = {}
    plans = {}
    for name, plan in asked.items():
        rows, columns = shapes[f"{name}.weight"]
        if (key := (plan.scheme, (rows, columns))) not in known:
            known[key] = codec_of(plan.scheme).fitting((rows, columns)) if plan.quantized else plan.scheme
        plans[name] = plan if known[key] == plan.scheme else replace(plan, scheme=known[key])
    return Plan(plans)


def fitting_candidates(recipe: Recipe, architecture: Architecture, linear: str) -> list[LinearPlan]:
    """``candidates_for`` with schemes that the linear's rows fit, each once."""
    return _fitting(candidates_for(recipe, linear), architecture, linear)


def fitting_outer(schemes: Iterable[CodecScheme], architecture: Architecture, module: str) -> list[LinearPlan]:
    """Plans of embedding or head by ``schemes``, which its rows are made to fit, each once."""
    return _fitting(map(LinearPlan, schemes), architecture, module)


def _fitting(plans: Iterable[LinearPlan], architecture: Architecture, module: str) -> list[LinearPlan]:
    rows, columns = architecture.module_shapes()[f"{module}.weight"]
    fit = (
        replace(plan, scheme=codec_of(plan.scheme).fitting((rows, columns))) if plan.quantized else plan
        for plan in plans
    )
    return list(dict.fromkeys(fit))


def _asked(recipe: Recipe, architecture: Architecture) -> Plan:
    head = None if architecture.tied else architecture.head
    return make_plan(settled(recipe, architecture), architecture.linears, architecture.embedding, head)


def stand_in_note(recipe: Recipe, plan: Plan, architecture: Architecture) -> list[str]:
    """What whoever uses the artifact should know of matrices whose rows do not fit the scheme that was asked for."""
    counts: Counter[tuple[str, str, int]] = Counter()
    for name, asked in _asked(recipe, architecture).items():
        if (found := plan[name].scheme) != asked.scheme:
            columns = architecture.module_shapes()[f"{name}.weight"][1]
            counts[scheme_text(asked.scheme), scheme_text(found), columns] += 1
    return [
        f"{count} matrices with rows of {columns} weights are stored as {instead}, because these do not fit {wanted}"
        for (wanted, instead, columns), count in counts.items()
    ]
