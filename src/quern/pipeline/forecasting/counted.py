"""What is counted before a job from headers, shapes and the recipe: bytes of the artifact, of the work folder, of memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import quern
from quern.advisor.forecasting.kinds import PLAIN, kernel_kind
from quern.advisor.forecasting.operations import Work, forward_operations, work_of
from quern.advisor.forecasting.results import Foretold
from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.codecs.base import codec_of
from quern.core.errors import UserError
from quern.core.machine.parallel import deterministic_workers
from quern.core.machine.temporary import temporary_folder
from quern.core.plan import LinearPlan, Plan
from quern.core.progress import Silent
from quern.core.recipe import Recipe
from quern.core.text.units import bytes_text
from quern.engines.cpu import cache_sizes
from quern.formats.base import ArtifactWriter, SizedWriter
from quern.formats.mixes.base import settled
from quern.pipeline.blockwise import disk_plan, memory_plan
from quern.pipeline.blockwise.job import Job, plan_of
from quern.pipeline.forecasting.shrunk import write_tokenizer
from quern.pipeline.forecasting.subject import Subject
from quern.pipeline.planning.sizes import Meta, Sizes
from quern.pipeline.request import checked_writer
from quern.quantization.rounding.base import ROUNDINGS

USUAL_LIBRARIES = 35 << 20
"""What torch's libraries take when they first compute: between the 20 and 50 MiB that were measured."""
TILE = 256
"""Rows; that of trellis codes is the largest."""
SHA256 = "0" * 64
"""In place of the hash of weights that are not read: as long."""


@dataclass(frozen=True)
class Case:
    """One model and one recipe, settled for it."""

    subject: Subject
    recipe: Recipe
    plan: Plan
    writer: ArtifactWriter

    @property
    def architecture(self) -> Architecture:
        """Of the model."""
        return self.subject.architecture

    @property
    def tokens(self) -> int:
        """Of calibration; 0 where none are needed."""
        return self.recipe.calibration.tokens if self.recipe.needs_calibration else 0

    @property
    def work(self) -> Work:
        """That quantizing takes."""
        hessian = [name for name in ROUNDINGS.names() if ROUNDINGS.get(name).needs_hessian]
        return work_of(self.architecture, self.plan, self.recipe, hessian)

    @property
    def forward_operations(self) -> int:
        """Of one token through all blocks."""
        return forward_operations(self.architecture)


def case_of(subject: Subject, recipe: Recipe) -> Case:
    """``recipe`` settled for the model. Raises ``UserError`` for what cannot be quantized so."""
    if recipe.allocation is not None:
        raise UserError(
            f"recipe {recipe.name!r} has an allocation: what it makes of each matrix is found out by a plan. Run quern plan "
            "with -o plan.yaml, and give plan.yaml as the recipe"
        )
    recipe = settled(recipe, subject.architecture)
    plan = plan_of(recipe, subject.architecture)
    return Case(subject, recipe, plan, checked_writer(recipe, plan, subject.architecture))


@dataclass(frozen=True)
class Bytes:
    """What an artifact takes."""

    files: Foretold
    data: int
    """Of all tensors."""
    read: dict[str, int]
    """That decoding a token reads, by kind of weights (``kernel_kind``)."""
    held: int
    """That is in memory for that: all experts."""
    cache: dict[str, int]
    """Of the keys and values of one token, by precision; empty for a layout that the cpu engine does not know."""


def bytes_of(case: Case) -> Bytes:
    """Counted by the code that writes the files."""
    cache, read = cache_sizes(case.architecture), _read(case)
    held = sum(_read(case, every_expert=True).values())
    if not isinstance(case.writer, SizedWriter):
        why = f"format {case.recipe.format} does not say beforehand how large its files will be"
        return Bytes(Foretold(value=None, unit="bytes", basis="counted", derivation=why), 0, read, held, cache)
    try:
        with _with_tokenizer(case.subject) as checkpoint:
            case.writer.prepare(checkpoint, {})
            found = _UsualSizes(checkpoint, case.architecture, case.writer, _fingerprint(case)).of_artifact(case.recipe)
    except UserError as error:
        why = f"not known: {error}"
        return Bytes(Foretold(value=None, unit="bytes", basis="counted", derivation=why), 0, read, held, cache)
    rest = found.files - found.data
    said = f"tensors {found.data:,} + headers, configuration, provenance and tokenizer {rest:,} = {found.files:,} bytes"
    if not case.subject.tokenizer:
        said += "; there is no tokenizer, whose bytes come on top"
    if case.recipe.storage == "entropy":
        said += "; entropy coding makes this less, by what only the codes tell"
    return Bytes(
        Foretold(value=found.files, unit="bytes", basis="counted", derivation=said), found.data, read, held, cache
    )


class _UsualSizes(Sizes):
    """With numbers whose texts are as long as they are on average, where a plan must not be below the artifact."""

    error = 0.00123456789012345
    summary = 0.012346

    def _encoded(self, shape: tuple[int, int], plan: LinearPlan) -> Meta:
        """From matrices of few rows, so that those of a 72B take neither memory nor time.

        What a format stores is padded to tiles of rows that divide ``TILE``; from one tile to the next every dimension grows
        by the same.
        """
        rows, columns = shape
        first = TILE + rows % TILE
        if rows <= first + TILE:
            return super()._encoded(shape, plan)
        low, high = (super(_UsualSizes, self)._encoded((n, columns), plan) for n in (first, first + TILE))
        steps = (rows - first) // TILE
        return {
            name: torch.empty(
                [a + (b - a) * steps for a, b in zip(tensor.shape, high[name].shape, strict=True)],
                dtype=tensor.dtype,
                device="meta",
            )
            for name, tensor in low.items()
        }


@contextmanager
def _with_tokenizer(subject: Subject) -> Iterator[Checkpoint]:
    """The checkpoint, with a tokenizer of bytes where it has none: formats of one file look at it."""
    if subject.tokenizer:
        yield subject.checkpoint
        return
    with temporary_folder("forecast") as folder:
        write_tokenizer(folder)
        yield replace(subject.checkpoint, path=folder)


def _fingerprint(case: Case) -> dict[str, Any]:
    calibrated = case.recipe.needs_calibration
    return {
        "quern": quern.__version__, "model_sha256": SHA256, "recipe": case.recipe.to_json(),
        "calibration_sha256": SHA256 if calibrated else None, "seed": 0, "device": "cpu",
    }  # fmt: skip


def _read(case: Case, every_expert: bool = False) -> dict[str, int]:
    """Of all matrices and vectors that a token meets: of an untied embedding nothing, of experts those it meets, or all."""
    architecture, shapes = case.architecture, case.architecture.module_shapes()
    totals: dict[str, float] = defaultdict(float)
    met = {}
    for block in architecture.blocks:
        experts = max(1, block.experts)
        for linear in block.linears:
            one_of_all = linear.expert is None or every_expert
            met[block.prefix + linear.name] = 1.0 if one_of_all else block.experts_per_token / experts
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == architecture.embedding and not architecture.tied:
            continue
        if module in case.plan and case.plan[module].quantized:
            parts = codec_of(case.plan[module].scheme).part_shapes((shape[0], shape[1])).values()
            size = sum(torch.empty(part, dtype=dtype, device="meta").nbytes for part, dtype in parts)
        else:
            size = torch.empty(shape, dtype=torch.bfloat16, device="meta").nbytes
        kind = kernel_kind(case.plan[module]) if module in case.plan else PLAIN
        totals[kind] += met.get(module, 1.0) * size
    return {kind: round(size) for kind, size in totals.items()}


@contextmanager
def job_of(case: Case, threads: int) -> Iterator[Job]:
    """A job as the quantization has it, which reads nothing: its tokens have no values."""
    sequences = None
    if case.tokens:
        config = case.architecture.config
        windows = filter(None, (block.window for block in case.architecture.blocks))
        time = min([case.recipe.calibration.sequence_length, int(config.max_position_embeddings), *windows])
        sequences = torch.empty(max(1, case.tokens // time), time, dtype=torch.int64, device="meta")
    with (
        temporary_folder("forecast") as folder,
        deterministic_workers(threads) as workers,
        WorkFolder.open(folder / "work", {}) as work,
    ):
        yield Job(
            case.subject.checkpoint, case.architecture, case.recipe, case.plan, case.writer, sequences, 0, work,
            workers, Silent(), torch.device("cpu"),
        )  # fmt: skip


def memory_of(case: Case, threads: int) -> Foretold:
    """Peak memory of quantizing: the plan that ``--memory`` is checked against, with what libraries take on average."""
    with job_of(case, threads) as job:
        plan = memory_plan.plan(job)
    stages = {"a block": plan.block, "embedding and head": plan.outer, "token weights": plan.sensitivity}
    largest = max(stages, key=lambda name: stages[name])
    process, libraries = plan.process - memory_plan.LIBRARIES, USUAL_LIBRARIES if case.tokens else 0
    total = process + libraries + stages[largest]
    said = (
        f"process {bytes_text(process)} + libraries {bytes_text(libraries)} + {largest} {bytes_text(stages[largest])} "
        f"(the largest stage) = {bytes_text(total)}; caps are accepted from {bytes_text(plan.peak)} on"
    )
    return Foretold(value=total, unit="bytes", basis="counted", derivation=said)


def disk_of(case: Case, threads: int) -> Foretold:
    """Largest size of output and work folder together: the plan that a quantization is checked against before it starts."""
    with job_of(case, threads) as job:
        plan = disk_plan.plan(job)
    parts = {
        "token weights are made": plan.sensitivity,
        "blocks are rounded": plan.blocks,
        "it is put in place": plan.publishing,
    }
    largest = max(parts, key=lambda name: parts[name])
    said = f"largest while {largest}: "
    if (beside := parts[largest] - plan.artifact) > 0 and largest != "token weights are made":
        said += f"finished stages {bytes_text(plan.artifact)} + what is kept on the way {bytes_text(beside)} = "
    return Foretold(value=plan.peak, unit="bytes", basis="counted", derivation=f"{said}{bytes_text(plan.peak)}")
