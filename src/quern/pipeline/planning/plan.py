"""Planning: the losses of candidates, a target, and the recipe that meets it with the least predicted loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import yaml

from quern.advisor.hardware import BUFFER_BYTES, read_bandwidth
from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.jobs.output_place import output_file, write_output
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.checkpoint.streaming.folder import forget_shards, streamed
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.core.allocation import Target
from quern.core.errors import UserError, option
from quern.core.machine.parallel import deterministic_workers, thread_count
from quern.core.plan import LinearPlan, candidates_for
from quern.core.progress import Progress, Silent
from quern.core.recipe import Recipe
from quern.core.text.scheme_text import scheme_text
from quern.core.text.units import significant
from quern.formats.base import FORMATS
from quern.loading.fitting import open_original
from quern.loading.padding import padded
from quern.pipeline.blockwise import memory_plan, sensitivity
from quern.pipeline.blockwise.calibration_text import CalibrationText
from quern.pipeline.blockwise.job import Job, fitting_candidates, fitting_outer, keeping, plan_of
from quern.pipeline.planning.budget import USUAL_CONTEXT, Budget, Chooser, Chosen, decided
from quern.pipeline.planning.losses import LossTable, loss_table, table_fingerprint, table_folder
from quern.pipeline.planning.sizes import Sizes
from quern.pipeline.planning.text_budget import settled_recipe
from quern.pipeline.request import (
    cache_folder,
    calibration_sequences,
    checked_writer,
    chosen_recipe,
    device_named,
    fingerprint_of,
)
from quern.quantization.allocation.candidate import Candidate, grouped
from quern.texts.source import Text

MARK = "# Written by quern plan."
"""First words of the files that are written."""


@dataclass(frozen=True)
class PlannedMatrix:
    """What one matrix becomes."""

    name: str
    choice: str
    """The scheme in words."""
    scheme: dict[str, Any]
    rotated: bool
    bytes: int
    loss: float
    """Predicted share of the mean KL divergence, in nats a token."""


@dataclass(frozen=True)
class PlanReport:
    """What ``plan`` chose."""

    recipe: Recipe
    target: Target
    matrices: list[PlannedMatrix]
    bytes: int
    """Of the whole artifact; at most a few bytes a linear too many."""
    bits_per_weight: float
    compression: float
    """1 - bytes / bytes of the checkpoint in bf16."""
    predicted_loss: float
    """Mean KL divergence in nats a token."""
    limit: str | None
    """The limit that the plan lies at; None where each matrix has the candidate that loses least."""
    smallest_bytes: int
    """Of the smallest artifact that the candidates allow."""
    memory_bytes: int
    """``bytes`` and a float16 key/value cache of ``context`` tokens."""
    context: int
    tokens_per_s: float | None
    """Reading all weights once a token at the bandwidth of ``min_speed``; None without one."""
    seconds: float
    """That the losses took when they were computed."""
    notes: list[str]
    path: Path | None = None
    """Where the recipe was written."""


def plan(
    model: str | Path,
    output: str | Path | None = None,
    *,
    recipe: str | Path | Recipe = "auto",
    target: Target | None = None,
    calibration: Sequence[str | Path | Text] = (),
    calibration_tokens: int | Literal["auto"] | None = None,
    calibration_time: float | None = None,
    memory: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    fresh: bool = False,
    threads: int | None = None,
    format: str | None = None,
    format_options: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
    stream: bool = False,
    progress: Progress | None = None,
) -> PlanReport:
    """Choose a scheme for each linear of ``model`` so that ``target`` (default: the recipe's) is met with the least loss.

    The recipe's allocation names the candidates. Their losses are computed once for a model and calibration, and kept in
    ``cache`` (default: the user's cache folder); an interrupted run continues there, ``fresh`` computes them anew. The
    result is a recipe without an allocation, which is written to the file ``output`` where that is given. Other arguments
    are as those of ``quantize``. Raises ``UserError`` for what cannot be met and ``BadFileError`` for damaged input.
    """
    path = None if output is None else output_file(output, is_plan)
    progress = progress or Silent()
    chosen = chosen_recipe(recipe, format, calibration_tokens)
    chosen = chosen if target is None else chosen.targeting(target)
    found = streamed(model, progress) if stream else model
    checkpoint = padded(open_original(found, progress=progress), chosen.padding)
    chosen, text_notes = settled_recipe(
        chosen, checkpoint, calibration, calibration_tokens, calibration_time,
        device=device, seed=seed, threads=threads, cache=cache, progress=progress)  # fmt: skip
    candidates = candidates_of(
        checkpoint,
        chosen,
        calibration=calibration,
        memory=memory,
        device=device,
        seed=seed,
        fresh=fresh,
        threads=threads,
        cache=cache_folder() if cache is None else Path(cache),
        progress=progress,
        format_options=format_options or {},
    )
    forget_shards(checkpoint)
    assert candidates.recipe.allocation is not None
    report = candidates.choose(candidates.recipe.allocation.target, threads)
    if path is not None:
        write_output(path, plan_text(report).encode())
    return replace(report, path=path, notes=[*text_notes, *report.notes])


def is_plan(path: Path) -> bool:
    """Whether the file is a recipe that ``plan`` wrote."""
    with open(path, "rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def plan_text(report: PlanReport) -> str:
    """The recipe as YAML, below what it was made for."""
    limits = ", ".join(f"{name} {value:,}" for name, value in report.target.model_dump().items())
    head = (
        f"{MARK} Target: {limits}. Predicted: {report.bytes:,} bytes, {report.bits_per_weight:.3f} bits per weight, "
        f"KL {significant(report.predicted_loss)} nats a token.\n"
    )
    body = yaml.safe_dump(report.recipe.to_json(), sort_keys=False, allow_unicode=True, width=120)
    return head + body


@dataclass(frozen=True)
class Candidates:
    """What may become of each matrix of a model, with bytes and losses: all that is needed to plan for any target."""

    checkpoint: Checkpoint
    architecture: Architecture
    recipe: Recipe
    of: dict[str, list[Candidate]]
    """By full name: embedding and head first, then the linears in order."""
    sizes: Sizes
    seconds: float
    """That the losses took when they were computed."""
    notes: tuple[str, ...]

    def choose(self, target: Target, threads: int | None = None) -> PlanReport:
        """The plan for ``target``. Raises ``UserError`` where none meets it."""
        context = _context(target, self.architecture)
        budget = self._budget(target, context, _bandwidth(target, threads))
        return self._report(self._chooser().choose(budget), budget, context)

    def refuse_sizes(self, target: Target) -> None:
        """Raise ``UserError`` where no candidates are small enough for ``target``, which no loss needs to be known for."""
        of_bytes = target.model_copy(update={"min_speed": None, "bandwidth_gb_s": None})
        self._chooser().smallest(self._budget(of_bytes, _context(target, self.architecture), None))

    def _budget(self, target: Target, context: int, bandwidth: float | None) -> Budget:
        return Budget(target, self.checkpoint.parameters, cache=self.sizes.of_cache(context), bandwidth=bandwidth)

    def _chooser(self) -> Chooser:
        assert self.recipe.allocation is not None
        architecture = self.architecture
        joined = self.recipe.allocation.joined or FORMATS.get(self.recipe.format).joins
        unread = () if architecture.tied else (architecture.embedding,)
        problem = grouped(self.of, _fused(architecture) if joined else (), unread)
        return Chooser(self.recipe, problem, self.of, self.sizes, architecture.outer)

    def _report(self, found: Chosen, budget: Budget, context: int) -> PlanReport:
        return PlanReport(
            recipe=found.recipe,
            target=budget.target,
            matrices=[
                PlannedMatrix(
                    name,
                    scheme_text(one.plan.scheme),
                    one.plan.scheme.to_json(),
                    one.plan.rotation is not None,
                    one.bytes,
                    one.loss,
                )
                for name, one in found.candidates.items()
            ],
            bytes=found.bytes.files,
            bits_per_weight=8 * found.bytes.data / self.checkpoint.parameters,
            compression=1 - found.bytes.files / self.checkpoint.bf16_bytes,
            predicted_loss=found.loss,
            limit=found.limit,
            smallest_bytes=found.smallest,
            memory_bytes=found.bytes.files + budget.cache,
            context=context,
            tokens_per_s=None if budget.bandwidth is None else budget.bandwidth / found.read,
            seconds=self.seconds,
            notes=[*self.checkpoint.notes, *self.notes],
        )


def candidates_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    calibration: Sequence[str | Path | Text],
    memory: int | None,
    device: str,
    seed: int,
    threads: int | None,
    cache: Path,
    progress: Progress,
    fresh: bool = False,
    format_options: Mapping[str, str] = MappingProxyType({}),
) -> Candidates:
    """The candidates of a checkpoint that is open and a recipe that has an allocation; other arguments as of ``plan``."""
    allocation = recipe.allocation
    if allocation is None:
        raise UserError(
            f"recipe {recipe.name!r} has no allocation: its schemes are fixed and nothing is left to plan. Use the recipe "
            "auto, or add candidates under allocation"
        )
    architecture, where = architecture_of(checkpoint.config), device_named(device)
    _context(allocation.target, architecture)
    alike = [_all_alike(recipe, architecture, place) for place in range(len(allocation.candidates))]
    writer, *_ = [checked_writer(one, plan_of(one, architecture), architecture) for one in alike]
    if kept := keeping(plan_of(alike[0], architecture)):
        raise UserError(
            f"recipe {recipe.name!r}: candidates are rounded to see what each of them loses, and {kept[0]} is to keep the "
            "values that it has. Take another rounding, or leave out the allocation"
        )
    text = CalibrationText(calibration, usable_tokenizer(checkpoint.path, True), recipe.calibration)
    writer.prepare(checkpoint, format_options)
    fingerprint = fingerprint_of(checkpoint, recipe, text, seed, device, progress, format_options)
    sizes = Sizes(checkpoint, architecture, writer, fingerprint)
    unknown = _with_bytes(recipe, architecture, None, sizes)
    Candidates(checkpoint, architecture, recipe, unknown, sizes, 0.0, ()).refuse_sizes(allocation.target)
    sequences = calibration_sequences(architecture, text, seed)
    assert sequences is not None
    wanted = table_fingerprint(recipe, fingerprint, sequences)
    work_folder = WorkFolder.open(table_folder(cache, wanted), wanted, fresh)
    with work_folder as work, deterministic_workers(threads) as workers:
        everything = plan_of(alike[0], architecture)
        untuned = recipe.model_copy(update={"tuning": None})  # losses are those of rounding
        job = Job(
            checkpoint, architecture, untuned, everything, writer, sequences, seed, work, workers, progress, where
        )
        job = memory_plan.within(job, memory, further_hessians=2)
        memory_plan.check(job, memory, further_hessians=2)
        table = loss_table(job, sensitivity.shared_folder(cache, fingerprint, job))
    found = _with_bytes(recipe, architecture, table, sizes)
    return Candidates(checkpoint, architecture, recipe, found, sizes, table.seconds, text.notes)


def _all_alike(recipe: Recipe, architecture: Architecture, place: int) -> Recipe:
    """The recipe of giving every linear its candidate at ``place``, or its last one."""
    plans: dict[str, LinearPlan] = {}
    for name in architecture.linears:
        candidates = candidates_for(recipe, name)
        plans[name] = candidates[min(place, len(candidates) - 1)]
    outer = {architecture.embedding: recipe.embedding, architecture.head: recipe.head}
    plans |= {module: LinearPlan(outer[module]) for module in architecture.outer}
    return decided(recipe, plans, architecture.outer)


def _with_bytes(
    recipe: Recipe, architecture: Architecture, table: LossTable | None, sizes: Sizes
) -> dict[str, list[Candidate]]:
    """The candidates of each matrix; without a ``table`` their losses are taken for 0."""
    assert recipe.allocation is not None
    fixed = {architecture.embedding: recipe.embedding, architecture.head: recipe.head}
    plans = {
        module: fitting_outer(recipe.allocation.outer or (fixed[module],), architecture, module)
        for module in architecture.outer
    }
    plans |= {name: fitting_candidates(recipe, architecture, name) for name in architecture.linears}
    losses = {name: [0.0] * len(choices) for name, choices in plans.items()}
    if table is not None:
        losses |= {**table.linears, **table.outer}
    return {
        name: [
            Candidate(name, one, sizes.of_matrix(name, one), loss)
            for one, loss in zip(choices, losses[name], strict=True)
        ]
        for name, choices in plans.items()
    }


def _fused(architecture: Architecture) -> list[tuple[str, ...]]:
    """Full names of the linears that runtimes join."""
    found = {
        tuple(block.prefix + name for name in linear.fused_with)
        for block in architecture.blocks
        for linear in block.linears
        if linear.fused_with
    }
    return sorted(found)


def _context(target: Target, architecture: Architecture) -> int:
    """Tokens of the key/value cache. Raises ``UserError`` for more than the model reads."""
    most = int(architecture.config.max_position_embeddings)
    if target.context is not None and target.context > most:
        raise UserError(
            f"a {option('context', '--context')} of {target.context} tokens is more than the {most} that the model reads"
        )
    return target.context or min(USUAL_CONTEXT, most)


def _bandwidth(target: Target, threads: int | None) -> float | None:
    """Bytes/s, given or measured; None where nobody asks."""
    if target.min_speed is None:
        return None
    if target.bandwidth_gb_s is not None:
        return target.bandwidth_gb_s * 1e9
    before, count = torch.get_num_threads(), thread_count(threads)
    try:
        return read_bandwidth([count], BUFFER_BYTES)[count] * 1e9
    finally:
        torch.set_num_threads(before)
