"""The main job: a checkpoint and a recipe in, an artifact out; resumable at every block."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.jobs.work_folder import WorkFolder, finish_removal
from quern.checkpoint.streaming.folder import forget_shards, streamed
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.comparison.artifact_size import source_notes
from quern.core.artifact import CalibratedInputs
from quern.core.errors import NotEnoughDiskError, OutOfMemoryCapError, UserError
from quern.core.machine.memory import forget_peak, peak_rss
from quern.core.machine.parallel import deterministic_workers
from quern.core.progress import Progress, Silent
from quern.core.recipe import Recipe
from quern.core.results import LayerError, TunedBlock
from quern.formats.mixes.base import settled
from quern.generation.stopping import named_ends
from quern.loading.fitting import open_original
from quern.loading.padding import padded, padding_notes, padding_record
from quern.pipeline.blockwise import disk_plan, memory_plan, sensitivity, tuning
from quern.pipeline.blockwise.blocks import quantize_blocks
from quern.pipeline.blockwise.calibration_text import CalibrationText
from quern.pipeline.blockwise.job import Job, OnUnhealthy, check_kept, kept_note, plan_of, stand_in_note
from quern.pipeline.blockwise.outer import quantize_outer, start_chain
from quern.pipeline.blockwise.reference_stream import start_stream
from quern.pipeline.blockwise.safeguards.gate import TOLD, findings_of, replaced_plans
from quern.pipeline.blockwise.safeguards.given_weights import FILES, check_weights, refuse_changed
from quern.pipeline.blockwise.safeguards.padding import padded_plan
from quern.pipeline.output import (
    artifact_size,
    finished_layers,
    opened_by,
    output_target,
    provenance_notes,
    publish,
    tensor_bytes,
    tuned_blocks,
)
from quern.pipeline.planning.plan import PlanReport, candidates_of
from quern.pipeline.planning.text_budget import settled_recipe
from quern.pipeline.request import (
    cache_folder,
    calibration_sequences,
    checked_writer,
    chosen_recipe,
    device_named,
    fingerprint_of,
    policy_named,
)
from quern.quantization.arithmetic import arithmetic
from quern.quantization.calibration.experts import starved_note
from quern.quantization.scale_dtypes import note as scale_note
from quern.texts.source import Text


@dataclass(frozen=True)
class QuantizeReport:
    """What ``quantize`` made."""

    path: Path
    recipe: Recipe
    seconds: float | None
    """Wall-clock time of this run; None for an artifact that was finished already."""
    bytes: int
    """All files of the artifact."""
    bits_per_weight: float
    """8 x bytes of tensor data / parameters of the checkpoint."""
    compression: float
    """1 - bytes / bytes of the checkpoint in bf16."""
    peak_rss_bytes: int
    """Of this process while it quantized, with all that it held before."""
    layers: list[LayerError]
    tuning: list[TunedBlock]
    """Of each block, where the recipe has a ``tuning``."""
    resumed: bool
    notes: list[str]


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe = "balanced",
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
    on_unhealthy: OnUnhealthy = "stop",
    stream: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize ``model`` (folder, Hub id or GGUF file) by ``recipe`` into the new folder ``output``, or the file of a format
    that is one.

    A recipe with an allocation is planned first (see ``planning/plan.py``), for the target that it names.
    ``calibration``: texts, or files of text or records (docs/texts.md; default: modules of the running Python's standard
    library), ``calibration_tokens`` of them (default: as the recipe says; ``auto``: as many as are worth it, found within
    ``calibration_time`` seconds where that is given). ``memory``: cap of the resident set in bytes. ``format_options``:
    choices that the format has besides (docs/gguf.md, docs/onnx.md). ``cache``: a folder for what other recipes can use
    again for the same model and calibration; the time that this spares counts in the report's ``seconds``. ``stream``: of a
    Hub model fetch shards when they are needed, and delete them. ``on_unhealthy``: what becomes of a block that is not fit
    for use (docs/long-runs.md): ``stop``, ``repair`` or ``warn``. An interrupted run continues where it stopped; the same
    arguments give the same bytes at any number of ``threads``. Raises ``UserError`` for requests that cannot be met,
    ``BadFileError`` for damage.
    """
    progress, policy = progress or Silent(), policy_named(on_unhealthy)
    chosen = chosen_recipe(recipe, format, calibration_tokens)
    target, output = output_target(output, model, fresh, chosen.format), Path(os.path.expanduser(output))
    found = streamed(model, progress) if stream else model
    checkpoint = padded(open_original(found, progress=progress), chosen.padding)
    given: dict[str, Any] = {"device": device, "seed": seed, "threads": threads, "progress": progress}
    chosen, text_notes = settled_recipe(
        chosen, checkpoint, calibration, calibration_tokens, calibration_time, cache=cache, **given)  # fmt: skip
    cache = cache_folder() if cache is None and chosen.allocation is not None else cache
    extra = dict(format_options or {})
    planned = _planned(checkpoint, chosen, calibration, memory=memory, cache=cache, format_options=extra, **given)
    architecture = architecture_of(checkpoint.config)
    chosen = settled(chosen, architecture) if planned is None else planned.recipe
    plan, where = padded_plan(plan_of(chosen, architecture), architecture, checkpoint), device_named(device)
    writer = checked_writer(chosen, plan, architecture)
    tokenizer = usable_tokenizer(checkpoint.path, chosen.needs_calibration)
    named_ends(checkpoint)  # the artifact takes the file over and could not generate with a bad one
    check_kept(checkpoint, architecture, plan)
    writer.prepare(checkpoint, extra)
    text = CalibrationText(calibration, tokenizer, chosen.calibration) if chosen.needs_calibration else None
    fingerprint = fingerprint_of(checkpoint, chosen, text, seed, device, progress, extra)
    if (layers := finished_layers(target, fingerprint, fresh)) is not None:
        finish_removal(target.work, target.path)
        return _finished(output, chosen, checkpoint, layers, planned)
    started = time.perf_counter()
    forget_peak()
    sequences = tuning.checked(calibration_sequences(architecture, text, seed), chosen)
    wanted = {**fingerprint, **arithmetic(), **writer.coder()}
    if not fresh:
        refuse_changed(target.work, checkpoint, fingerprint["model_sha256"])
    with WorkFolder.open(target.work, wanted, fresh) as work, deterministic_workers(threads) as workers:
        if work.finish_publishing() is not None and (layers := finished_layers(target, fingerprint, False)) is not None:
            work.remove()
            return _finished(output, chosen, checkpoint, layers, planned)
        resumed = work.done("started") is not None
        told = work.telling(progress)
        job = Job(checkpoint, architecture, chosen, plan, writer, sequences, seed, work, workers, told, where, policy)
        job = _in_room(job, memory, resumed)
        work.finish("started", [], {FILES: checkpoint.hashed})
        check_weights(job)
        notes = [*text_notes, *(text.notes if text else ())]
        spared, layers = _carry_out(job, cache, fingerprint, notes)
        publish(work, target, fresh)
    before = planned.seconds if planned else 0.0
    seconds = time.perf_counter() - started + (before or spared)  # planning computes the token weights too
    return _report(output, chosen, checkpoint, seconds, layers, resumed, [*notes, *writer.notes()], planned)


def _in_room(job: Job, memory: int | None, resumed: bool) -> Job:
    """The job, cut so that it fits. Raises ``OutOfMemoryCapError`` or ``NotEnoughDiskError`` where it does not."""
    try:
        job = memory_plan.within(job, memory)
        memory_plan.check(job, memory)
        disk_plan.check(job)
        return job
    except (OutOfMemoryCapError, NotEnoughDiskError):
        if not resumed:
            job.work.remove()  # or the next attempt, with another recipe, would be told that this one is unfinished
        raise


def _carry_out(
    job: Job, cache: str | Path | None, fingerprint: dict[str, Any], notes: list[str]
) -> tuple[float, list[dict[str, Any]]]:
    """All steps, from the token weights to what goes along with the last block; the seconds that ``cache`` spared and the
    errors of all layers. Adds to ``notes``."""
    if (known := job.writer.joining(job.work)) is not None:
        job.writer.accompany(job.work, known, job.checkpoint)
        notes += [note for note in known["notes"] if note not in notes]
        return 0.0, known["layers"]
    spared = 0.0
    if sensitivity.needed(job):
        shared = None if cache is None else sensitivity.shared_folder(Path(cache), fingerprint, job)
        spared = sensitivity.run(job, shared)
    quantize_outer(job)
    start_chain(job)
    if job.follows_stream:
        start_stream(job)
    quantize_blocks(job)
    forget_shards(job.checkpoint)
    return spared, _write_metadata(job, fingerprint, notes)


def _planned(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Sequence[str | Path | Text], threads: int | None, **given: Any
) -> PlanReport | None:
    """What the recipe's allocation decides for its target; None without one."""
    if recipe.allocation is None:
        return None
    candidates = candidates_of(checkpoint, recipe, calibration=calibration, threads=threads, **given)
    return candidates.choose(recipe.allocation.target, threads)


def _write_metadata(job: Job, fingerprint: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """Everything that makes the stages one artifact: the format's own, provenance, tokenizer. Returns the errors of all
    layers and adds to ``notes``."""
    layers = job.architecture.layers
    errors: list[dict[str, Any]] = []
    inputs: list[dict[str, Any]] = []
    tuned: list[dict[str, Any]] = []
    dtypes: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    for step in ("outer 0", *(f"block {index}" for index in range(layers)), f"outer {layers + 1}"):
        record = job.work.done(step)
        if record is None:
            raise UserError(f"the work folder lost step {step!r}; run the same command again")
        records.append(record)
        errors += record["layers"]
        dtypes |= record.get("scale_dtypes", {})
        inputs += record.get("inputs", [])
        tuned += [record["tuning"]] if "tuning" in record else []
    replaced, health = replaced_plans(job, records), findings_of(records)
    dtypes = {name: dtype for name, dtype in dtypes.items() if name not in replaced}
    job.writer.finish(job.work, job.checkpoint.config, job.plan.changed(dtypes).replaced(replaced))
    instead = stand_in_note(job.recipe, job.plan, job.architecture)
    stopped = tuning.notes([TunedBlock.model_validate(block) for block in tuned])
    stored_otherwise = [*kept_note(job.plan), *instead, *scale_note(dtypes), *stopped, *starved_note(errors)]
    notes += [*stored_otherwise, *(one.text for one in health)]
    lasting = [*job.checkpoint.lasting_notes, *stored_otherwise]
    provenance = {"fingerprint": fingerprint, "layers": errors, "notes": lasting, "files": []}
    provenance |= padding_record(job.checkpoint)
    if inputs and job.sequences is not None:
        tokens, sequences = job.sequences.numel(), len(job.sequences)
        seen = {"tokens": tokens, "sequences": sequences, "groups": inputs}
        provenance["inputs"] = CalibratedInputs.model_validate(seen).model_dump(mode="json")
    if tuned:
        provenance["tuning"] = tuned
    if lasting_health := [one.model_dump(mode="json") for one in health if one.kind not in TOLD]:
        provenance["health"] = lasting_health
    job.writer.accompany(job.work, provenance, job.checkpoint)
    return errors


def _finished(
    output: Path, recipe: Recipe, checkpoint: Checkpoint, layers: list[dict[str, Any]], planned: PlanReport | None
) -> QuantizeReport:
    """The report of an artifact that an earlier run of the same job made."""
    notes = ["was finished already", *provenance_notes(output)]
    return _report(output, recipe, checkpoint, None, layers, True, notes, planned)


def _report(
    output: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    seconds: float | None,
    layers: list[dict[str, Any]],
    resumed: bool,
    notes: list[str],
    planned: PlanReport | None,
) -> QuantizeReport:
    output = opened_by(output)
    predicted = {matrix.name: matrix.loss for matrix in planned.matrices} if planned else {}
    size, data = artifact_size(output), tensor_bytes(output, recipe.format)
    return QuantizeReport(
        path=output,
        recipe=recipe,
        seconds=seconds,
        bytes=size,
        bits_per_weight=8 * data / checkpoint.parameters,
        compression=1 - size / checkpoint.bf16_bytes,
        peak_rss_bytes=peak_rss(),
        layers=[
            LayerError.model_validate({**layer, "predicted_loss": predicted.get(layer.get("linear", ""))})
            for layer in layers
        ],
        tuning=tuned_blocks(output),
        resumed=resumed,
        notes=list(
            dict.fromkeys([*checkpoint.notes, *source_notes(checkpoint, size), *padding_notes(checkpoint), *notes])
        ),
    )
