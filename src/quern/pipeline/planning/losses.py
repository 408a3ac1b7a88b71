"""The table of losses: one pass over the blocks of the unquantized model that rounds every linear by every candidate.

Token weights come first (``blockwise/sensitivity.py``); then each block, on the unquantized one's inputs, gives the Hessians
of its linears, and each candidate is rounded with them as the recipe says. Last come embedding and head. What was found of
a block is one line of the journal, so a run that was stopped goes on behind the last one; a finished table is read again in
no time. The folder's name and fingerprint hold everything that the losses depend on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.architectures.base import LinearGroup
from quern.core.machine.heap import release_freed
from quern.core.progress import Task
from quern.core.recipe import Recipe
from quern.pipeline.blockwise import sensitivity
from quern.pipeline.blockwise.job import Job, fitting_candidates
from quern.pipeline.planning import outer_losses
from quern.quantization.arithmetic import arithmetic
from quern.quantization.calibration.block import Block, Tap
from quern.quantization.calibration.experts import Reader, batches, make_up, needed
from quern.quantization.calibration.statistics import GroupStatistics, Wanted, add_tap, add_up, collector
from quern.quantization.calibration.token_weights import normalized
from quern.quantization.candidate_losses import Judges, candidate_losses, sampled_rows
from quern.quantization.transforms.base import TRANSFORMS, InputRotation

UNQUANTIZED = "unquantized"
"""Hidden states on their way through the unquantized blocks."""
JUDGES_OF = 4
"""Of so many calibration sequences the last is one to judge by, and the others are those to round by. Fewer are both."""


@dataclass(frozen=True)
class LossTable:
    """Losses in nats a token, by matrix in the order of its ``candidates_for`` or outer schemes."""

    linears: dict[str, list[float]]
    outer: dict[str, list[float]]
    seconds: float
    """That computing it took, in whichever runs."""


def table_folder(cache: Path, fingerprint: Mapping[str, Any]) -> Path:
    """The folder in ``cache`` of the table that ``table_fingerprint`` describes."""
    return cache / f"losses-{hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]}"


def table_fingerprint(recipe: Recipe, fingerprint: Mapping[str, Any], sequences: Tensor) -> dict[str, Any]:
    """Everything that the losses depend on: the job's ``fingerprint`` but for target and format, tokens and arithmetic."""
    assert recipe.allocation is not None
    asked = recipe.to_json()
    for key in ("name", "description", "weights", "embedding", "head", "format"):
        del asked[key]
    asked.pop("tuning", None)  # it comes after the roundings that are measured
    asked["allocation"] = {key: asked["allocation"][key] for key in ("candidates", "outer", "rows")}
    if not recipe.allocation.outer:
        asked["allocation"]["outer"] = [recipe.embedding.to_json(), recipe.head.to_json()]
    depends = {key: fingerprint[key] for key in ("quern", "model_sha256", "seed", "device")} | arithmetic()
    tokens = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    return {**depends, "tokens": tokens, "holds": "losses of candidates that fit, row by row", "recipe": asked}


def loss_table(job: Job, shared: Path | None = None) -> LossTable:
    """The table of ``job``, whose work folder is the table's; continues where an earlier run was stopped.

    With ``shared`` (a ``sensitivity.shared_folder``) the token weights are left there for the quantization that follows.
    """
    layers = job.architecture.layers
    steps = [*(f"losses {index}" for index in range(layers)), "losses outer"]
    if any(job.work.done(step) is None for step in steps):
        _compute(job, shared)
    records = [job.work.done(step) or {} for step in steps]
    linears = {name: list(losses) for record in records[:-1] for name, losses in record["losses"].items()}
    spent = sum(float((job.work.done(step) or {}).get("seconds", 0)) for step in (*steps, "token weights"))
    return LossTable(linears, records[-1]["losses"], spent)


def _compute(job: Job, shared: Path | None) -> None:
    architecture = job.architecture
    started = time.perf_counter()
    if job.work.done("token weights") is None:
        sensitivity.run(job, sample=_sample(job))
        job.work.finish("token weights", [], {"seconds": time.perf_counter() - started})
    if shared is not None:
        sensitivity.share(job, shared, float((job.work.done("token weights") or {})["seconds"]))
    _start_chain(job)
    pending = [index for index in range(architecture.layers) if job.work.done(f"losses {index}") is None]
    behind = sum(len(architecture.block(i).linears) for i in range(architecture.layers) if i not in pending)
    task = job.progress.task("losses of candidates", len(architecture.linears), behind)
    for index in pending:
        _block_losses(job, index, task)
        release_freed()
    task.done()
    if job.work.done("losses outer") is None:
        started = time.perf_counter()
        losses = outer_losses.outer_losses(job, job.activations(UNQUANTIZED, architecture.layers))
        job.work.finish("losses outer", [], {"losses": losses, "seconds": time.perf_counter() - started})
    for index in range(architecture.layers + 1):
        job.activations(UNQUANTIZED, index).path.unlink(missing_ok=True)
    job.activations(sensitivity.GRADIENTS, 0).path.unlink(missing_ok=True)
    for kind in (sensitivity.WEIGHTS, sensitivity.ROWS, sensitivity.SAMPLED):
        for path in job.work.path(kind).glob("*.safetensors"):
            path.unlink()
        with suppress(OSError):
            job.work.path(kind).rmdir()


def _start_chain(job: Job) -> None:
    """Inputs of the first block."""
    assert job.sequences is not None
    if job.work.done(f"{UNQUANTIZED} 0") is not None or job.work.done("losses 0") is not None:
        return
    sequences, embedding = job.sequences, job.read(f"{job.architecture.embedding}.weight")
    store = job.activations(UNQUANTIZED, 0)
    store.write(lambda start, stop: embedding[sequences[start:stop]])
    job.work.finish(f"{UNQUANTIZED} 0", [store.path], {})


def _block_losses(job: Job, index: int, task: Task) -> None:
    assert job.sequences is not None
    started = time.perf_counter()
    block = Block(job.architecture, index, job.read, job.compute_dtype, job.sequences.shape[1])
    weights = {name: normalized(values) for name, values in sensitivity.token_weights(job, index).items()}
    gradients = _Gradients(sensitivity.row_squares(job, index), sensitivity.sampled_gradients(job, index))
    losses: dict[str, list[float]] = {}
    source, following = (job.activations(UNQUANTIZED, place) for place in (index, index + 1))
    with block.lent(job.workers):
        for stage in block.spec.stages:
            found: dict[str, list[float]] = {}
            uses: dict[str, float] = {}
            for some in batches(stage, lambda group: _hessian_bytes(block, group), job.hessian_bytes):
                for group, known in zip(some, _statistics(job, block, some, weights), strict=True):
                    found |= _group_losses(job, block, group, known, gradients, task)
                    uses |= dict.fromkeys((block.spec.prefix + name for name in group.linears), known.use)
                release_freed()
            losses |= _of_rarely_met(job, block, found, uses)
        following.write(lambda start, stop: block.run_each(source.read(start, stop), job.workers), job.workers)
    job.work.finish(f"{UNQUANTIZED} {index + 1}", [following.path], {})
    job.work.finish(f"losses {index}", [], {"losses": losses, "seconds": time.perf_counter() - started})
    source.path.unlink()


@dataclass
class _Known:
    """Of one group's inputs: statistics of the tokens to round by, and the inputs of those to judge by."""

    rounding: GroupStatistics
    judging: list[Tap]

    @property
    def use(self) -> float:
        """Share of the tokens to judge by that met the group's linears."""
        return sum(len(tap.inputs) for tap in self.judging) / sum(tap.length for tap in self.judging)


@dataclass(frozen=True)
class _Gradients:
    """Of one block, by linear: see ``sensitivity.row_squares`` and ``sampled_gradients``."""

    row_squares: dict[str, Tensor]
    sampled: dict[str, Tensor]


def _sample(job: Job) -> sensitivity.Sample:
    """The gradients that candidates are judged by."""
    assert job.sequences is not None
    assert job.recipe.allocation is not None
    most, sequences = job.recipe.allocation.rows, len(job.sequences)
    return sensitivity.Sample(
        lambda linear, rows: sampled_rows(rows, most, job.seed, linear), lambda place: _judges(place, sequences)
    )


def _statistics(
    job: Job, block: Block, stage: Sequence[LinearGroup], weights: Mapping[str, tuple[Tensor, float]]
) -> list[_Known]:
    """Of what the groups of a stage read in the unquantized block: Hessians for each linear, by its own token weights."""
    source = job.activations(UNQUANTIZED, block.spec.index)
    wanted = [
        Wanted(
            hessians=group.linears,
            token_weights={name: weights[name][0] for name in group.linears},
            loss_scales={name: weights[name][1] for name in group.linears},
        )
        for group in stage
    ]
    found = [
        _Known(collector(want, block.linear(group.linears[0]).in_features, job.device), [])
        for want, group in zip(wanted, stage, strict=True)
    ]
    first = [group.linears[0] for group in stage]
    sequences, time, _ = source.shape

    def captured(start: int, stop: int) -> tuple[range, dict[str, Tap]]:
        return range(start, stop), block.capture(first, source.read(start, stop), job.workers)

    for wave, taps in job.workers.ahead(captured, source.waves()):
        for place in wave:
            for want, known, name in zip(wanted, found, first, strict=True):
                part = taps[name].part((place - wave.start) * time, (place - wave.start + 1) * time)
                if _judges(place, sequences):
                    known.judging.append(part)
                if not _judges(place, sequences) or sequences < JUDGES_OF:
                    add_tap(known.rounding, want, place * time, part, job.workers)
    add_up([known.rounding for known in found], job.workers)
    experts = [block.spec.linear(name).expert for name in first]
    readers = [
        Reader(group.linears, expert, want, known.rounding)
        for group, expert, want, known in zip(stage, experts, wanted, found, strict=True)
        if expert is not None
    ]
    make_up(block, source, readers, job.workers)
    return found


def _hessian_bytes(block: Block, group: LinearGroup) -> int:
    return sum(4 * block.linear(name).in_features ** 2 for name in group.linears)


def _of_rarely_met(
    job: Job, block: Block, found: Mapping[str, list[float]], uses: Mapping[str, float]
) -> dict[str, list[float]]:
    """Losses by full name. An expert that met few of the tokens to judge by has for each candidate what the others of its
    role and candidates lose for each token that meets them, on average, times its use, and one token more."""
    tokens = job.sequences.numel() if job.sequences is not None else 0
    by_role: dict[object, list[str]] = {}
    for name in found:
        linear = block.spec.linear(name.removeprefix(block.spec.prefix))
        if linear.expert is not None:
            plans = tuple(fitting_candidates(job.recipe, job.architecture, name))
            by_role.setdefault((linear.role, plans), []).append(name)
    result = dict(found)
    for names in by_role.values():
        columns = block.linear(names[0].removeprefix(block.spec.prefix)).in_features
        few = needed(columns) / tokens
        usual = [name for name in names if uses[name] >= few]
        for name in set(names) - set(usual) if usual else ():
            each = zip(*([loss / uses[one] for loss in found[one]] for one in usual), strict=True)
            result[name] = [(uses[name] + 1 / tokens) * sum(losses) / len(usual) for losses in each]
    return result


def _judges(sequence: int, sequences: int) -> bool:
    """Whether candidates are judged by a sequence."""
    return sequences < JUDGES_OF or sequence % JUDGES_OF == JUDGES_OF - 1


def _judges_of(known: _Known, gradients: Tensor) -> Judges:
    """The tokens to judge one linear by; ``gradients`` ``(tokens, sampled rows)`` are of all of them, in order."""
    parts = torch.split(gradients, known.judging[0].length)
    met = [tap.of_tokens(part) for tap, part in zip(known.judging, parts, strict=True)]
    return Judges(torch.cat([tap.inputs for tap in known.judging]), torch.cat(met), len(gradients))


def _group_losses(
    job: Job, block: Block, group: LinearGroup, known: _Known, gradients: _Gradients, task: Task
) -> dict[str, list[float]]:
    """By full name, the losses of the linears that read the same input."""
    assert job.recipe.allocation is not None
    found = {}
    columns = block.linear(group.linears[0]).in_features
    signs = _signs(job, columns, block.spec.index, group.name)
    for name in group.linears:
        full, weight = block.spec.prefix + name, block.linear(name).weight.data
        found[full] = candidate_losses(
            weight,
            fitting_candidates(job.recipe, job.architecture, full),
            known.rounding.by_linear[name],
            _judges_of(known, gradients.sampled[name].to(job.device)),
            row_squares=gradients.row_squares[name],
            signs=signs,
            rows=sampled_rows(len(weight), job.recipe.allocation.rows, job.seed, full),
            workers=job.workers,
        )
        task.advance()
    return found


def _signs(job: Job, columns: int, index: int, group: str) -> Tensor | None:
    """Those that the quantization will rotate the group's inputs by."""
    rotation = job.recipe.rotation
    if rotation is None:
        return None
    method = TRANSFORMS.get(rotation.method)(rotation)
    assert isinstance(method, InputRotation)
    return method.signs(columns, job.seed, index, group)
